"""Settings: what is given goes before the environment, the environment before the default; each bad value is one clear line."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from conftest import REPOSITORY
from orchestrator import Config, ConfigError, redact_url

Run = Callable[..., subprocess.CompletedProcess[str]]
BAD = [
    ("WORKER_POOL_SIZE", "-1"), ("WORKER_POOL_SIZE", "0"), ("WORKER_POOL_SIZE", "1001"), ("WORKER_POOL_SIZE", "ten"),
    ("WORKER_POOL_SIZE", "2.5"), ("CLAIM_INTERVAL", "abc"), ("CLAIM_INTERVAL", "5"), ("CLAIM_INTERVAL", "-1s"),
    ("CLAIM_INTERVAL", "1h"), ("CLAIM_INTERVAL", "0"), ("DISTRIBUTED_MODE", "maybe"), ("HEARTBEAT_INTERVAL", "10 seconds"),
    ("WORKER_TIMEOUT", "nan"), ("WORKER_TIMEOUT", "5s"), ("LEADER_TERM", "0"), ("LEADER_TERM", "1e3s"), ("CLEANUP_INTERVAL", "1ms"),
    ("METRICS_PORT", "70000"), ("METRICS_PORT", "-1"), ("METRICS_PORT", "http"), ("SHUTDOWN_GRACE", "soon"),
    ("SHUTDOWN_GRACE", "99999999d"), ("RETENTION_COMPLETED", "7"), ("RETENTION_DEAD_LETTER", "-7d"), ("PREPARED_STATEMENTS", "2"),
    ("LOG_FORMAT", "xml"), ("DEBUG", "verbose"), ("DATABASE_URL", "mysql://host/db"), ("DATABASE_URL", "nonsense"),
    ("DATABASE_URL", "host=x colour=blue"), ("DATABASE_URL", "postgresql://u:p/w@host/db"), ("DATABASE_URL", "postgresql://h:port/db"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as refused:
        Config.load({}, {name: value})
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=f"^{name}: "):
        Config.load({name.lower(): value}, {})


def test_defaults_are_the_documented_ones() -> None:
    config = Config.load({}, {})
    assert (config.worker_pool_size, config.claim_interval, config.distributed_mode, config.heartbeat_interval) == (10, 1.0, False, 10.0)
    assert (config.worker_timeout, config.leader_term, config.cleanup_interval, config.shutdown_grace) == (30.0, 30.0, 60.0, 30.0)
    assert (config.metrics_port, config.metrics_host, config.log_format, config.debug) == (9090, "127.0.0.1", "text", False)
    assert (config.retention_completed, config.retention_dead_letter) == (7 * 86400, 30 * 86400)


@pytest.mark.parametrize(("text", "seconds"), [("100ms", 0.1), ("1s", 1), ("1.5s", 1.5), (" 1m ", 60), ("1h", 3600), ("1d", 86400)])
def test_durations_have_units(text: str, seconds: float) -> None:
    assert Config.load({}, {"SHUTDOWN_GRACE": text}).shutdown_grace == seconds


def test_zero_needs_no_unit() -> None:
    assert Config.load({}, {"RETENTION_COMPLETED": "0"}).retention_completed == 0


def test_given_goes_before_the_environment_and_that_before_the_default() -> None:
    environment = {"WORKER_POOL_SIZE": "3", "LOG_FORMAT": "json", "CLAIM_INTERVAL": ""}
    config = Config.load({"worker_pool_size": 4, "debug": None}, environment)
    assert (config.worker_pool_size, config.log_format, config.claim_interval, config.debug) == (4, "json", 1.0, False)


def test_programs_may_give_numbers_and_timedeltas() -> None:
    config = Config.load({"claim_interval": timedelta(milliseconds=200), "shutdown_grace": 2, "debug": True}, {})
    assert (config.claim_interval, config.shutdown_grace, config.debug) == (0.2, 2, True)


@pytest.mark.parametrize("given", [
    {"worker_pool_size": 2.5}, {"worker_pool_size": True}, {"worker_pool_size": [1]}, {"claim_interval": float("nan")},
    {"claim_interval": b"1s"}, {"distributed_mode": 1}, {"metrics_host": 5}, {"database_url": 5}, {"handlers": object()}])
def test_a_value_of_the_wrong_kind_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given)).upper()}: must be "):
        Config.load(given, {})


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="^WORKER_POOL: there is no such setting"):
        Config.load({"worker_pool": 5}, {})


def test_a_password_is_not_in_the_message_of_a_bad_database_url() -> None:
    for url in ("postgresql://user:canary/x@host/db", "user:canary@host"):
        with pytest.raises(ConfigError) as refused:
            Config.load({"database_url": url}, {})
        assert "canary" not in str(refused.value)


@pytest.mark.parametrize("url", [
    "postgresql://u:canary@h/db", "postgres://u:canary@@h:5432/db", "postgresql://h/db?user=u&password=canary&x=1",
    "host=h password=canary dbname=d", "host=h password = 'can\\'ary canary' user=u", "could not reach postgresql://u:canary@h/db: no"])
def test_redact_url_hides_the_password(url: str) -> None:
    hidden = redact_url(url)
    assert "canary" not in hidden and "ary" not in hidden and "***" in hidden
    assert re.search(r"\bh\b", hidden)


@pytest.mark.parametrize(("name", "value"), [
    ("WORKER_POOL_SIZE", "-3"), ("CLAIM_INTERVAL", "abc"), ("DATABASE_URL", "nonsense"), ("METRICS_PORT", "x"),
    ("HANDLERS", "no_such_module")])
@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_worker_ends_with_2_and_one_line_for_a_bad_setting(run_cli: Run, name: str, value: str, how: str) -> None:
    if how == "flag":
        done = run_cli("--" + name.lower().replace("_", "-"), value)
    else:
        done = run_cli(env={name: value})
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: {name}: [^\n]+\n", done.stderr)


def test_ci_unsets_every_setting_before_it_runs_the_tests() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    unset = re.findall(r"grep -E '(\^.*\$)'", script)[0]
    assert [name for name in Config.load({}, environ={}).__dataclass_fields__ if not re.match(unset, name.upper())] == []
