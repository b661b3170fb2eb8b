"""The chat page in a headless Chromium, which talks to a server of the demo model."""

import re
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import DESKTOP, PHONE, open_browser, show_as
from running_server import Running
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
HOSTILE = "<img src=x onerror='document.title=1'><script>document.title=1</script>\n```\n<b>&amp;</b>\n```"
StartServer = Callable[..., Running]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(window: Chrome) -> Iterator[Chrome]:
    """A window that remembers nothing; at the end of the test nothing went wrong in it but what servers refuse."""
    window.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
    show_as(window, DESKTOP)
    yield window
    said = [line["message"] for line in window.get_log("browser") if line["source"] != "network"]
    assert said == []


def open_page(browser: Chrome, server: Running, **settings: str) -> None:
    browser.get(server.url)
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.get(server.url)
    if settings:
        browser.find_element(By.ID, "open-settings").click()
        fill_in(browser, **settings)


def fill_in(browser: Chrome, **settings: str) -> None:
    for name, value in settings.items():
        browser.find_element(By.NAME, name).send_keys(value)
    browser.find_element(By.CSS_SELECTOR, "dialog .main").click()


def send(browser: Chrome, text: str) -> None:
    box = browser.find_element(By.ID, "prompt")
    browser.execute_script("arguments[0].value = arguments[1]", box, text)  # as pasted: a line's end sends nothing
    box.send_keys(Keys.ENTER)


def wait(browser: Chrome, condition: Callable[[Chrome], Any]) -> Any:
    return WebDriverWait(browser, 60, 0.05).until(condition)


def wait_until_answered(browser: Chrome) -> list[str]:
    """The texts of all messages, once the last one is complete."""
    wait(browser, lambda b: b.find_element(By.ID, "log").get_attribute("aria-busy") == "false")
    return texts(browser)


def texts(browser: Chrome) -> list[str]:
    return [one.text for one in browser.find_elements(By.CSS_SELECTOR, "article > .text")]


def press(browser: Chrome, name: str, place: int = 0) -> WebElement:
    """Click one of the buttons with this name."""
    button = [one for one in browser.find_elements(By.TAG_NAME, "button") if one.text == name][place]
    button.click()
    return button


def test_the_page_is_open_and_may_ask_its_own_server_alone(start_server: StartServer) -> None:
    with urllib.request.urlopen(start_server(api_key="secret").url, timeout=30) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'; connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"https?://|//cdn|@import|<link(?! rel=\"icon\" href=\"data:)", page)


def test_an_answer_comes_in_pieces(browser: Chrome, server: Running) -> None:
    open_page(browser, server, temperature="0")
    assert wait(browser, lambda b: b.find_element(By.ID, "model").text == "demo")
    browser.execute_script(
        "window.seen = new Set(); const note = () => seen.add(messages.at(-1)?.node.innerText);"
        "new MutationObserver(note).observe(log, {subtree: true, childList: true})"
    )
    send(browser, QUESTION)
    assert wait_until_answered(browser) == [QUESTION, ANSWER]
    assert browser.execute_script("return seen.size") > 3
    speed = browser.find_element(By.CSS_SELECTOR, "article:last-of-type .speed").text
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s", speed)
    assert browser.find_element(By.ID, "status").get_attribute("textContent") == "The answer is complete."
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert asked and all(name.startswith(server.url) for name in asked)


def test_settings_are_sent_and_kept(browser: Chrome, server: Running) -> None:
    open_page(browser, server, temperature="0", max_tokens="2", system="Answer in French.")
    browser.get(server.url)
    send(browser, QUESTION)
    _, answer = wait_until_answered(browser)
    dialog: Any = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": QUESTION}]
    (expected,) = server.llama.chat_completion([dialog], temperature=0, max_gen_len=2)
    assert answer == expected["generation"]["content"].strip()
    assert "ended by its length" in browser.find_element(By.CSS_SELECTOR, "article:last-of-type .speed").text


@pytest.mark.parametrize("stops", ["Escape", "Stop"])
def test_an_answer_is_stopped(browser: Chrome, start_server: StartServer, stops: str) -> None:
    server = start_server()
    never = dict.fromkeys(server.llama.tokenizer.stop_tokens, -100.0)
    server.service.options.defaults["logit_bias"] = never  # type: ignore[index]
    open_page(browser, server)
    send(browser, QUESTION)
    wait(browser, lambda b: len(texts(b)) == 2 and texts(b)[1])
    assert not browser.find_element(By.CSS_SELECTOR, "article .waits").is_enabled()
    if stops == "Stop":
        press(browser, "Stop")
    else:
        browser.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
    before = wait_until_answered(browser)
    server.wait_until_idle()
    assert texts(browser) == before and before[1]
    assert browser.find_element(By.CSS_SELECTOR, "article:last-of-type .speed").text.endswith("stopped")


def test_a_message_is_edited_and_an_answer_written_again(browser: Chrome, server: Running) -> None:
    open_page(browser, server, temperature="0")
    for question in ("What is the capital of Italy?", "And what is that?"):
        send(browser, question)
        wait_until_answered(browser)
    assert len(texts(browser)) == 4
    press(browser, "Edit")
    assert browser.switch_to.active_element.accessible_name == "Edited message"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert len(texts(browser)) == 4 and not browser.find_elements(By.CSS_SELECTOR, ".edit")
    press(browser, "Edit")
    box = browser.switch_to.active_element
    box.clear()
    box.send_keys(QUESTION, Keys.ENTER)
    assert wait_until_answered(browser) == [QUESTION, ANSWER]
    send(browser, "Thank you.")
    wait_until_answered(browser)
    press(browser, "Regenerate")
    assert wait_until_answered(browser) == [QUESTION, ANSWER]
    press(browser, "New chat")
    assert texts(browser) == [] and browser.find_element(By.ID, "welcome").is_displayed()


def test_what_the_model_writes_is_text(browser: Chrome, start_server: StartServer) -> None:
    server = start_server(defaults={"response_format": {"type": "choice", "choice": [HOSTILE]}})
    open_page(browser, server)
    send(browser, HOSTILE)
    asked, answered = wait_until_answered(browser)
    shown = HOSTILE.replace("```\n", "\n").removesuffix("\n```")
    assert asked.split() == answered.split() == shown.split()
    assert not browser.find_elements(By.CSS_SELECTOR, "#log img, #log script, #log b")
    assert [one.text for one in browser.find_elements(By.TAG_NAME, "pre")] == ["<b>&amp;</b>"] * 2
    assert browser.title == "demo"


def test_a_script_that_gets_into_the_page_is_not_run(window: Chrome, server: Running) -> None:
    open_page(window, server)
    window.execute_script(
        "const it = document.createElement('script'); it.textContent = 'window.ran = 1'; log.append(it)"
    )
    assert window.execute_script("return window.ran") is None
    assert any("Content Security Policy" in line["message"] for line in window.get_log("browser"))


def test_errors_say_what_the_server_says(browser: Chrome, server: Running) -> None:
    open_page(browser, server, max_tokens="5000")
    send(browser, QUESTION)
    wait_until_answered(browser)
    assert "maximum context length is 512 tokens" in browser.find_element(By.CSS_SELECTOR, "article .error").text
    assert browser.find_element(By.ID, "send").is_displayed()


def test_a_key_is_asked_for(browser: Chrome, start_server: StartServer) -> None:
    open_page(browser, start_server(api_key="secret", defaults={"temperature": 0}))
    send(browser, QUESTION)
    wait(browser, lambda b: b.find_element(By.ID, "key-asked").is_displayed())
    assert browser.find_element(By.ID, "key-asked").text == "Incorrect API key provided."
    assert browser.switch_to.active_element.get_attribute("name") == "key"
    fill_in(browser, key="secret")
    press(browser, "Regenerate")
    assert wait_until_answered(browser) == [QUESTION, ANSWER]
    assert browser.execute_script("return JSON.stringify(localStorage)").find("secret") < 0


def test_lines_are_begun_with_shift(browser: Chrome, server: Running) -> None:
    open_page(browser, server, max_tokens="3")
    box = browser.find_element(By.ID, "prompt")
    height = box.size["height"]
    box.send_keys("one", Keys.SHIFT + Keys.ENTER)
    box.send_keys(Keys.NULL, "two")
    assert box.get_attribute("value") == "one\ntwo" and box.size["height"] > height and texts(browser) == []
    box.send_keys(Keys.ENTER)
    assert wait_until_answered(browser)[0] == "one\ntwo" and box.get_attribute("value") == ""


def check_controls(browser: Chrome, place: str) -> None:
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
    found = browser.find_elements(By.CSS_SELECTOR, f"{place} :is(button, input, textarea)")
    shown = [one for one in found if one.is_displayed()]
    assert len(shown) >= 5
    for one in shown:
        assert one.accessible_name, one.get_attribute("outerHTML")
        assert one.rect["x"] >= 0 and one.rect["x"] + one.rect["width"] <= PHONE[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Chrome, server: Running, scheme: str) -> None:
    """Nothing is wider than the screen, everything has a name, and letters stand out from what is behind them."""
    show_as(browser, PHONE, scheme)
    open_page(browser, server, max_tokens="3")
    send(browser, "w" * 200)
    wait_until_answered(browser)
    check_controls(browser, "body > :not(dialog)")
    press(browser, "Settings")
    check_controls(browser, "dialog")
    look = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    ink, page = (sum(map(int, re.findall(r"\d+", one))) for one in browser.execute_script(look))
    assert abs(ink - page) > 500 and (ink > page) == (scheme == "dark")
