"""Format of log lines, phases and progress."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from asyncllm import log
from asyncllm.log import ProgressBar, StderrHandler, phase, setup


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, quiet = root.level, {name: logging.getLogger(name).level for name in log.QUIET}
    yield
    logging.captureWarnings(False)
    for handler in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(handler)
    root.setLevel(level)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)


def test_line_has_time_level_rank_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    setup("info", who="rank3")
    logging.getLogger("asyncllm.engine.device").warning("%d slots", 5)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING rank3 engine\.device: 5 slots\n", line)


def test_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup("info", json=True, who="http1")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("asyncllm.rank").exception('two\nlines "quoted"')
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry.pop("error").endswith("ValueError: bad")
    assert entry == {
        "level": "ERROR",
        "who": "http1",
        "module": "rank",
        "message": 'two\nlines "quoted"',
    }


def test_level_and_quiet_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    setup("debug")
    logging.getLogger("asyncllm.x").debug("ours")
    for name in ("transformers.loading", "httpx", "urllib3.pool", "aiohttp.access"):
        logging.getLogger(name).info("chatter")
    logging.getLogger("httpx").warning("matters")
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "ours",
        "matters",
    ]
    setup("error")
    logging.getLogger("asyncllm.x").warning("hidden")
    logging.getLogger("httpx").warning("hidden")
    assert capsys.readouterr().err == ""


def test_setting_up_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    setup(who="rank0")
    setup(who="rank1")
    logging.getLogger("asyncllm.x").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_phase_logs_seconds_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    clock = Clock()
    monkeypatch.setattr(log.time, "monotonic", clock)
    with phase("load weights"):
        clock.now += 1.23
    assert capsys.readouterr().err.endswith("INFO rank0 start: load weights: 1.2 s\n")


def test_phase_that_fails_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    setup()
    with pytest.raises(KeyError), phase("load weights"):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_progress_off_a_terminal_is_a_line_per_quarter_and_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup()
    clock = Clock()
    with ProgressBar("download", 100_000_000, stream=io.StringIO(), clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.01
            progress.advance(1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"\((\d+) %\)", line)[1] for line in lines] == ["25", "50", "75", "100"]  # type: ignore[index]
    assert lines[-1].endswith("start: download: 100.0 of 100.0 MB (100 %), 100.0 MB/s")


def test_slow_progress_off_a_terminal_is_a_line_each_five_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup()
    clock = Clock()
    with ProgressBar("download", 0, stream=io.StringIO(), clock=clock) as progress:
        for _ in range(12):
            clock.now += 1.0
            progress.advance(1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("download: ")[2] for line in lines] == [
        "5.0 MB, 1.0 MB/s",
        "10.0 MB, 1.0 MB/s",
        "12.0 MB, 1.0 MB/s",
    ]


def test_failed_progress_does_not_claim_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    setup()
    with pytest.raises(OSError, match="cut"), ProgressBar("get", 100, stream=io.StringIO()):
        raise OSError("cut")
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal_is_redrawn_in_place_at_a_bounded_rate() -> None:
    stream, clock = Terminal(), Clock()
    with ProgressBar("load", 200_000_000, stream=stream, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.01
            progress.advance(1_000_000)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert 8 <= text.count("\r") <= 12
    last = text.rpartition("\x1b[K")[2]
    assert last == "[##########..........] load: 100.0 of 200.0 MB (50 %), 100.0 MB/s\n"


def test_log_lines_stand_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    setup()
    with ProgressBar("load", 10, clock=Clock()) as progress:
        before = len(stream.getvalue())
        logging.getLogger("asyncllm.x").info("hello")
        written = stream.getvalue()[before:]
        assert progress.live
    assert re.match(r"\r\x1b\[K\d\d:.* hello\n\r\x1b\[K\[\.+\] load: ", written)
    logging.getLogger("asyncllm.x").info("after")
    assert stream.getvalue().endswith("after\n")


def test_json_logs_have_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    setup(json=True)
    with ProgressBar("load", 10) as progress:
        progress.advance(10)
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == ["INFO"]


def test_what_comes_often_is_one_line_a_minute_with_a_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 5.0
    seldom = log.RateLimitedLog(logging.getLogger("asyncllm.x"), lambda: now)
    for i in range(100):
        seldom.warning("frame %d", i)
    now += 59.0
    seldom.warning("frame %d", 100)
    now += 1.0
    seldom.warning("frame %d", 101)
    now += 61.0
    seldom.warning("frame %d", 102)
    assert caplog.messages == [
        "frame 0",
        "frame 101 (and 100 more since the last such line)",
        "frame 102",
    ]
