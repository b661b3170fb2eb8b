"""The OpenAPI document, by another program: schemathesis makes requests of it, and none may fail the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from running_server import Running
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error

EXAMPLES = 40  # of each endpoint and mode


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_fails_the_server(server: Running, mode: GenerationMode) -> None:
    operations = [one.ok() for one in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and operation.method == "get":
            continue  # they have nothing that could be invalid

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        ask()
    server.wait_until_idle()
