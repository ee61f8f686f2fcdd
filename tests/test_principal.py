"""Who sends a request."""

from headtail.stages.serve.principal import ANYONE, admit_all


def test_an_open_server_admits_everyone_as_one_caller_without_a_name() -> None:
    assert admit_all(b"Bearer x", "answer", 1) is ANYONE
    assert admit_all(None, "answer", 1).name == ""
