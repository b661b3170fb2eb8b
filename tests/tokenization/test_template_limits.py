# ruff: noqa: E501 (a template is one line)
"""What a template may take: programs that would never end, or would fill the memory, are stopped in time, and named."""

import time

import pytest
from published_tokenizers import NOW

from llama.errors import LlamaError
from llama.tokenization.template_environment import CompiledTemplate, give

NESTED = "{% set ns = namespace(l=(1,)) %}{% for i in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}"
GROWING = "{% set ns = namespace(s='ab', l=[1], n=7) %}{% for i in range(60) %}"
HOSTILE = {
    "repeated": "{{ ('a' * 100000) * 100000 }}",
    "doubled": GROWING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "added": GROWING + "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "list doubled": GROWING + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "number squared": GROWING + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "printed": NESTED + "{{ ns.l }}",
    "hashed": NESTED + "{{ {}[ns.l] }}",
    "key": NESTED + "{{ {ns.l: 1} }}",
    "get": NESTED + "{{ {}.get(ns.l) }}",
    "json": NESTED + "{{ ns.l | tojson }}",
    "joined": NESTED + "{{ [ns.l] | join }}",
    "items": NESTED + "{{ {1: ns.l}.items() }}",
    "compared": NESTED + "{{ ns.l == [ns.l, ns.l] }}",
    "mapped": NESTED + "{{ [1] | map(ns.l) | list }}",
    "formatted": NESTED + "{{ '%s' % [ns.l] }}",
    "format": NESTED + "{{ '{}'.format(ns.l) }}",
    "in a test": NESTED + "{{ 1 is in(ns.l) }}",
    "refused with": NESTED + "{{ raise_exception(ns.l) }}",
    "holding itself": "{% set ns = namespace() %}{% set ns.l = [ns, ns] %}{{ ns }}",
    "pad": "{{ '%10000000000d' % 1 }}",
    "pads": "{{ '%10000000000s' % 'x' }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center2": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "fmt": "{{ '{:1000000000}'.format(1) }}",
    "fmt2": "{{ '{:{}}'.format('a', 10**9) }}",
    "fmt3": "{{ '{0:>1000000000}'.format('a') }}",
    "join": "{{ range(99999)|join('a'*90000) }}",
    "batch": "{{ [1]|batch(10**9,'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "list mul": "{{ ([1] * 10**10)|length }}",
    "list mul2": "{{ ([1] * 99999 * 99999)|length }}",
    "tuple mul": "{{ ((1,) * 10**10)|length }}",
    "slices kept": "{% set ns = namespace(l=[], b=range(99999)|list) %}{% for i in range(99999) %}{% set ns.l = [ns.b[:], ns.l] %}{% endfor %}",
    "replace": "{{ ('a'*90000).replace('', 'b'*90000) }}",
    "replacef": "{{ ('a'*90000)|replace('a', 'b'*90000) }}",
    "indent": "{{ ('a\n'*90000)|indent(99999) }}",
    "intpow": "{{ 2**4000 * 2**4000 }}",
    "int16": "{{ ('f'*1000000)|int(0,16) }}",
    "range list": "{% for i in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
    "round": "{{ 5|round(-10**9) }}",
    "tojsonindent": "{{ [1]|tojson(indent=10**9) }}",
    "power of a power": "{{ 9 ** (9 ** 9) }}",
}
ENDLESS = {
    "two loops of 99,999": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro2": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filter loop2": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "filter loop": "{% for i in range(99999) if range(99999)|select('equalto', i)|list|length > 5 %}{% endfor %}",
}
MORE_ENDLESS = {
    "gen chains": "{{ range(99999)|map('string')|map('upper')|map('lower')|map('list')|map('join')|list|length }}",
    "range sum": "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "range max": "{% for i in range(99999) %}{{ range(99999)|max }}{% endfor %}",
    "in range": "{% for i in range(99999) %}{{ 'a' in range(99999) }}{% endfor %}",
    "star": "{% macro m() %}{{ varargs|length }}{% endmacro %}{% for i in range(99999) %}{{ m(*range(99999)) }}{% endfor %}",
    "sort": "{% for i in range(99999) %}{{ (range(99999)|list)[::-1]|sort|length }}{% endfor %}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "split": "{% set ns=namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ('a '*90000).split() %}{% endfor %}",
    "iter": "{% for c in ('ab'*30000000) %}{% endfor %}",
    "dict": "{% set ns = namespace(l=[], b=range(99999)|list) %}{% for i in range(99999) %}{% set ns.l = [dict(a=ns.b), ns.l] %}{% endfor %}",
    "lower": "{% for i in range(9999) %}{% set x = ('ab '*3000000)|lower %}{% endfor %}",
    "find": "{% set s = ('ab'*3000000) %}{% set t = 'ba'*100000 ~ 'x' %}{% for i in range(99999) %}{% set x = s.find(t) %}{% endfor %}",
}
NOT_READ = {
    "padstar": "{{ '%*d' % (10**9, 1) }}",
    "tobytes": "{{ (5).to_bytes(10**10) }}",
    "translate": "{{ 'a'.translate({97: 'b'*90000}) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "autoescape": "{% autoescape 'a'|center(10**10) == 1 %}{% endautoescape %}",
    "macro": "{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(30) }}",
    "recursive": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "loops in loops": "{% for a in b %}" * 3000 + "{% endfor %}" * 3000,
    "sums": "{{ 1" + "+1" * 40_000 + " }}",
    "too long": "{{ 'a' }}" * 20_000,
    "random": "{{ [1, 2] | random }}",
}


def render(template: str) -> str:
    return CompiledTemplate(template, NOW).render({"messages": [give({"role": "user", "content": "hi"}, "a message")]})


def fail(template: str) -> str:
    """The message of the error that ends the template, which takes at most some more than 2 s of CPU time."""
    started = time.thread_time()
    with pytest.raises(LlamaError) as refusal:
        render(template)
    assert time.thread_time() - started < 4
    assert "\n" not in str(refusal.value) and "template" in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_what_is_too_large_is_stopped(template: str) -> None:
    assert "too much" in (message := fail(template)) or "too large" in message


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_is_stopped(template: str) -> None:
    assert "too long" in (message := fail(template)) or "too much" in message


@pytest.mark.slow
@pytest.mark.parametrize("template", MORE_ENDLESS.values(), ids=MORE_ENDLESS)
def test_more_that_never_ends_is_stopped(template: str) -> None:
    assert "too long" in (message := fail(template)) or "too much" in message


@pytest.mark.parametrize("template", NOT_READ.values(), ids=NOT_READ)
def test_what_is_not_supported_is_named(template: str) -> None:
    fail(template)


def test_memory_is_counted_as_it_is_freed() -> None:
    """A text that grows piece by piece is held once: long dialogs are no attack."""
    grown = "{% set ns = namespace(s='') %}{% for i in range(2000) %}{% set ns.s = ns.s ~ 'a' * 1000 %}{% endfor %}{{ ns.s }}"
    assert len(render(grown)) == 2_000_000


def test_a_long_dialog_is_rendered_fast() -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}{% endfor %}"
    compiled = CompiledTemplate(template, NOW)
    messages = [give({"role": "user", "content": "the fox " * 50}, "a message") for _ in range(1000)]
    started = time.thread_time()
    text = compiled.render({"messages": messages})
    assert len(text) > 400_000 and time.thread_time() - started < 1


def test_two_threads_render_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    compiled = CompiledTemplate("{% for i in range(2000) %}{{ i }}{{ messages[0].content }}{% endfor %}", NOW)
    messages = [give({"role": "user", "content": "hi"}, "a message")]
    with ThreadPoolExecutor(4) as pool:
        texts = [*pool.map(lambda _: str(compiled.render({"messages": messages})), range(8))]
    assert len(set(texts)) == 1
