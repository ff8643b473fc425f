"""Payloads of the built-in handlers: accepted, or refused by a ValueError that names the field and not its value."""
from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import handlers
from handlers import check_backup, check_nextjs, check_notion_clone
from orchestrator import Cancelled, Discard
from test_handlers_process import StandInTask, call

CANARY = "kanarienvogel"
FIELD = re.compile(r"(payload|working_dir|port|host|ready_timeout|user|password|password_env|password_file|database"
                   r"|backup_dir|retention_days|seconds|fail_times|SERVICE_ROOT|BACKUP_ROOT): ")


@pytest.fixture
def roots(tmp_path, monkeypatch) -> Path:
    """The operator's directories, with what a payload may name, and outside of them what it may not."""
    for name in ("services/shop", "backups/daily", "secrets", "outside"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("secrets/db", "outside/secret", "services/file"):
        (tmp_path / name).write_text("from the file\n")
    (tmp_path / "services/link").symlink_to(tmp_path / "outside")
    (tmp_path / "services/alias").symlink_to(tmp_path / "services/shop")
    (tmp_path / "backups/link").symlink_to(tmp_path / "outside")
    (tmp_path / "secrets/link").symlink_to(tmp_path / "outside/secret")
    os.mkfifo(tmp_path / "secrets/fifo")
    monkeypatch.setenv("SERVICE_ROOT", str(tmp_path / "services"))
    monkeypatch.setenv("BACKUP_ROOT", str(tmp_path / "backups"))
    monkeypatch.setenv("BACKUP_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setenv("BACKUP_PASSWORD_SHOP", "from the environment")
    return tmp_path


@pytest.fixture
def spawned(monkeypatch) -> list[Any]:
    """What was started: nothing is, really."""
    started: list[Any] = []

    def refuse(args: Any, **_: Any) -> None:
        started.append(args)
        raise OSError(0, "not started in this test")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return started


# --- Everything that JSON can hold ------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=20), st.sampled_from([
        "", "-", "--help", "-h", "/", "..", "../..", "/etc", "shop", "link", "alias", "a\nb", "a\0b", "\ud800",
        "localhost", "127.0.0.1", "::1", "x=y", "postgres://h/d", "a,b", "/run/postgresql", "PGPASSWORD",
        "DATABASE_URL", "daily"]),
    st.text(max_size=20).map(lambda text: CANARY + text), st.integers(250, 5000).map(lambda size: "x" * size))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([0, 1, -1, 3000, 65535, 65536, 10**400])
    | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)


def spoiled(valid: dict[str, Any], *optional: str) -> st.SearchStrategy[Any]:
    """Any JSON, or a valid payload with some fields taken out and some replaced or added."""
    fields = st.sampled_from([*valid, *optional, "else"])
    changed = st.builds(lambda gone, new: {**{name: value for name, value in valid.items() if name not in gone}, **new},
                        st.sets(fields, max_size=1), st.dictionaries(fields, json_values, max_size=2))
    return json_values | changed


CHECKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], st.SearchStrategy[Any]]] = {
    "service:nextjs": (handlers.nextjs, check_nextjs, spoiled(
        {"working_dir": "shop", "port": 3000, "host": "127.0.0.1"}, "ready_timeout")),
    "service:notion-clone": (handlers.notion_clone, check_notion_clone, spoiled({})),
    "task:backup": (handlers.backup, check_backup, spoiled(
        {"host": "localhost", "port": 5432, "user": "me", "database": "shop", "backup_dir": "daily",
         "retention_days": 7}, "password", "password_env", "password_file")),
}


def assert_within_bounds(options: Any, roots: Path) -> None:
    assert 1 <= options.port <= 65535
    assert isinstance(options.port, int)
    if isinstance(options, handlers.Service):
        assert (options.working_dir + "/").startswith(f"{roots}/services/")
        assert re.fullmatch(r"[0-9a-f.:]+", options.host)
        assert 1 <= options.ready_timeout <= 3600
    else:
        assert (options.directory + "/").startswith(f"{roots}/backups/")
        for text in (options.host, options.user, options.database):
            assert not text.startswith("-")
            assert not re.search(r"[\0\n]", text)
        assert "\n" not in (options.password or "")
        assert "/" not in options.label
        assert len(options.label) < 200
        assert 0 <= options.retention_days < math.inf


@pytest.mark.parametrize("type", CHECKS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_payload_is_accepted_within_bounds_or_refused_by_field_with_nothing_spawned(
        type, data, roots, spawned, monkeypatch):
    handler, check, payloads = CHECKS[type]
    monkeypatch.setenv("NOTION_CLONE_DIR", str(roots / "services/shop"))
    payload = data.draw(payloads)
    try:
        options = check(payload)
    except ValueError as refusal:
        assert FIELD.match(str(refusal)), f"names no field: {refusal}"
        assert CANARY not in str(refusal).partition("unknown field")[0]
        assert len(str(refusal)) < 400
        str(refusal).encode()
        with pytest.raises(Discard) as discarded:
            call(handler, StandInTask(payload))
        assert str(discarded.value) == str(refusal)
        assert spawned == []
    else:
        if type != "service:notion-clone":
            assert_within_bounds(options, roots)


@settings(max_examples=300, deadline=None)
@given(payload=spoiled({"seconds": 0}, "fail_times"))
def test_demo_handlers_accept_or_discard_any_payload(payload):
    for handler in (handlers.slow, handlers.flaky):
        task = StandInTask(payload, attempt=10**9)
        task.cancel()
        try:
            call(handler, task)
        except Discard as refusal:
            assert FIELD.match(str(refusal))
        except Cancelled:
            assert handler is handlers.slow


# --- Cases with a meaning of their own --------------------------------------------------------------------------------

@pytest.mark.parametrize("value", ["/etc", "..", "../outside", "link", "link/..", "shop/../../outside", "/",
                                   "/proc/self/cwd"])
def test_working_dir_outside_of_the_root_is_refused(roots, value):
    with pytest.raises(ValueError, match=f"working_dir: must be inside SERVICE_ROOT \\({roots}/services\\)"):
        check_nextjs({"working_dir": value})


def test_sibling_whose_name_begins_like_the_root_is_outside(roots):
    (roots / "services-of-others").mkdir()
    with pytest.raises(ValueError, match="working_dir: must be inside"):
        check_nextjs({"working_dir": f"{roots}/services-of-others"})


def test_working_dir_inside_is_resolved(roots):
    for value in ("shop", "./shop", "alias", f"{roots}/services/alias"):
        assert check_nextjs({"working_dir": value}).working_dir == f"{roots}/services/shop"


def test_working_dir_that_is_a_file_or_absent_is_refused(roots):
    for value in ("file", "absent"):
        with pytest.raises(ValueError, match="working_dir: there is no such directory"):
            check_nextjs({"working_dir": value})


def test_service_root_is_where_the_worker_was_started_unless_that_is_the_root_directory(roots, monkeypatch):
    monkeypatch.delenv("SERVICE_ROOT")
    monkeypatch.chdir(roots / "services")
    assert check_nextjs({"working_dir": "shop"}).working_dir == f"{roots}/services/shop"
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="SERVICE_ROOT: must be set"):
        check_nextjs({"working_dir": "etc"})


def test_backup_root_is_the_folder_backups_where_the_worker_was_started(roots, monkeypatch):
    monkeypatch.delenv("BACKUP_ROOT")
    monkeypatch.chdir(roots)
    assert check_backup({"database": "shop"}).directory == f"{roots}/backups"


@pytest.mark.parametrize("value", ["/etc", "..", "link", "daily/../..", f"{'x' * 1100}"])
def test_backup_dir_outside_of_the_root_is_refused(roots, value):
    with pytest.raises(ValueError, match="backup_dir: must be"):
        check_backup({"database": "shop", "backup_dir": value})


@pytest.mark.parametrize("field", ["host", "user", "database", "backup_dir", "password_file", "password_env"])
def test_value_that_a_program_could_take_for_an_option_is_refused(roots, field):
    for value in ("-", "-f", "--file=x"):
        with pytest.raises(ValueError, match=f"{field}: must not start with a dash"):
            check_backup({"database": "shop", field: value})


@pytest.mark.parametrize("field", ["database", "user", "backup_dir", "password_file"])
@pytest.mark.parametrize("value", ["postgresql://me:canary@db/shop", "host=db password=canary", "x PASSWORD = canary"])
def test_connection_string_with_a_password_is_refused_where_a_name_belongs(roots, field, value):
    with pytest.raises(ValueError, match=f"{field}: must not be a URL or connection string with a password") as refusal:
        check_backup({"database": "shop", field: value})
    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize("host", ["a b", "a,b", "h?x", "h;x", "/run,/etc", "@abstract", "h/../x", "h=1"])
def test_host_is_one_name_address_or_socket_directory(roots, host):
    with pytest.raises(ValueError, match="host: must be a host name"):
        check_backup({"database": "shop", "host": host})


@pytest.mark.parametrize("host", ["example.com", "fe80::1%eth0;x", "127.0.0.1 ", "1", "127.1"])
def test_service_listens_on_an_address_only(roots, host):
    with pytest.raises(ValueError, match="host: must be an IP address"):
        check_nextjs({"working_dir": "shop", "host": host})


def test_booleans_strings_and_fractions_are_not_numbers(roots):
    for port in (True, "3000", 3000.5, [], 0, 65536):
        with pytest.raises(ValueError, match="port: must be a whole number from 1 to 65535"):
            check_nextjs({"working_dir": "shop", "port": port})
    for days in (True, "7", -1, math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match="retention_days: must be a number from 0 to 36500"):
            check_backup({"database": "shop", "retention_days": days})


def test_unknown_field_is_named_so_that_a_misspelt_one_is_not_ignored(roots):
    with pytest.raises(ValueError, match=r"unknown field 'retention'; the fields of this type are: .*retention_days"):
        check_backup({"database": "shop", "retention": 7})


def test_password_comes_from_the_payload_a_variable_or_a_file(roots):
    assert check_backup({"database": "shop"}).password is None
    assert check_backup({"database": "shop", "password": "-p:\\'x"}).password == "-p:\\'x"
    assert check_backup({"database": "shop", "password_env": "BACKUP_PASSWORD_SHOP"}).password == "from the environment"
    assert check_backup({"database": "shop", "password_file": "db"}).password == "from the file"
    assert check_backup({"database": "shop", "password_file": f"{roots}/secrets/db"}).password == "from the file"


def test_password_is_in_no_representation_of_the_options(roots):
    assert CANARY not in repr(check_backup({"database": "shop", "password": CANARY}))


@pytest.mark.parametrize("variable", ["DATABASE_URL", "ADMIN_TOKEN", "PATH", "XBACKUP_PASSWORD", "BACKUP_PASSWORD=x"])
def test_password_env_reads_no_other_variable_of_the_worker(roots, monkeypatch, variable):
    if "=" not in variable:
        monkeypatch.setenv(variable, "secret")
    with pytest.raises(ValueError, match="password_env: must be PGPASSWORD or a name that starts with BACKUP_PASSWORD"):
        check_backup({"database": "shop", "password_env": variable})


def test_password_env_that_is_not_set_is_refused(roots):
    with pytest.raises(ValueError, match="password_env: this variable is not set"):
        check_backup({"database": "shop", "password_env": "BACKUP_PASSWORD_ABSENT"})


def test_password_file_reads_no_other_file(roots):
    for value in ("/etc/passwd", "../outside/secret", "link"):
        with pytest.raises(ValueError, match="password_file: must be inside BACKUP_SECRETS"):
            check_backup({"database": "shop", "password_file": value})


@pytest.mark.parametrize("value", ["absent", ".", "fifo"])
def test_password_file_that_cannot_be_read_is_refused_without_waiting(roots, value):
    with pytest.raises(ValueError, match="password_file: "):
        check_backup({"database": "shop", "password_file": value})


def test_two_passwords_are_refused(roots):
    with pytest.raises(ValueError, match="password_env: only one of"):
        check_backup({"database": "shop", "password": "x", "password_env": "BACKUP_PASSWORD_SHOP"})


def test_password_with_a_line_break_cannot_reach_the_password_file(roots):
    with pytest.raises(ValueError, match="password: must not contain control characters"):
        check_backup({"database": "shop", "password": "x\n*:*:*:*:y"})


def test_labels_of_different_databases_and_servers_differ(roots):
    payloads = [{"database": database, "host": host, "port": port}
                for database in ("a", "a-b", "a@b", "A", "a/b", "ä" * 31)
                for host in ("b", "b-1", "/run/b", "::1", "x" * 100) for port in (1, 11)]
    assert len({check_backup(payload).label for payload in payloads}) == len(payloads)
