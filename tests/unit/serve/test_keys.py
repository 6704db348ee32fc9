"""Nobody gets in without a key, and a key file others can read is not used."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from farspan.config.schema import ServeConfig
from farspan.config.serve_rules import is_loopback
from farspan.errors import ConfigError
from farspan.serve.keys import Allowance, find_key, hashed_lines, keys_of, parse_key, read_keys


def test_only_bearers_of_a_key_are_let_in(tmp_path):
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text("sk-one\n\n  sk-two  \n")
    keys, path = read_keys(ServeConfig(model="m", host="0.0.0.0", api_key_file=str(file)), tmp_path)
    assert path == file
    assert find_key("Bearer sk-one", keys)
    assert find_key("bearer sk-two", keys)
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic sk-one",
        "Bearer sk-three",
        "sk-one",
        f"Bearer {keys[0].digest}",
    ):
        assert not find_key(header, keys)
    assert "sk-" not in repr(keys)


def test_a_line_says_what_its_key_may_use_and_old_files_say_nothing(tmp_path):
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text("sk-one\nsk-two requests_per_minute=60  tokens_per_minute=9000 concurrent=4 priority=-5\n")
    keys, _ = read_keys(ServeConfig(model="m", api_key_file=str(file)), tmp_path)
    assert find_key("Bearer sk-one", keys).allowance == Allowance()
    assert find_key("Bearer sk-two", keys).allowance == Allowance(60, 9000, 4, -5)


@pytest.mark.parametrize(
    "words", ["request_per_minute=6", "concurrent=0", "concurrent=four", "concurrent", "sk-other=="]
)
def test_a_line_that_says_something_else_is_refused_without_a_word_of_the_key(tmp_path, words):
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text(f"sk-fine\nsk-secret {words}\n")
    with pytest.raises(ConfigError, match=r"api_key_file: .*line 2") as refused:
        read_keys(ServeConfig(model="m", api_key_file=str(file)), tmp_path)
    assert "sk-" not in str(refused.value)


def test_names_derived_from_a_key_differ_by_key_and_purpose_and_do_not_show_it():
    one, two = parse_key("sk-one", 1), parse_key("sk-two", 2)
    names = {key.derived(purpose) for key in (one, two) for purpose in ("tenant", "prefix ")}
    assert len(names) == 4
    assert not names & {one.digest, two.digest}
    # Known only to who has the key: not its bare hash, which would be the name for every purpose.
    wanted = hmac.new(hashlib.sha256(b"sk-one").digest(), b"tenant", hashlib.sha256).hexdigest()
    assert one.derived("tenant") == wanted


def test_a_made_key_stands_in_a_private_file_and_is_made_once(tmp_path):
    first, path = read_keys(ServeConfig(model="m"), tmp_path / "state")
    second, again = read_keys(ServeConfig(model="m"), tmp_path / "state")
    assert (first, path) == (second, again)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert find_key(f"Bearer {path.read_text().strip()}", first)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_file_others_can_read_is_refused(tmp_path, mode):
    file = tmp_path / "keys"
    file.write_text("sk-secret\n")
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"mode 600.*chmod 600") as refused:
        read_keys(ServeConfig(model="m", api_key_file=str(file)), tmp_path)
    assert "sk-secret" not in str(refused.value)


def test_missing_and_empty_key_files_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.touch(mode=0o600)
    for path in (empty, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_keys(ServeConfig(model="m", api_key_file=str(path)), tmp_path)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.7", False), ("::", False)],
)
def test_a_host_other_machines_reach_needs_a_key_file(tmp_path, host, expected):
    assert is_loopback(host) == expected
    config = ServeConfig(model="m", host=host)
    if expected:
        assert read_keys(config, tmp_path)
    else:
        with pytest.raises(ConfigError, match="must be given"):
            read_keys(config, tmp_path)


def test_a_home_that_cannot_be_written_is_refused_in_one_sentence_with_the_way_out(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.touch()
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(ConfigError, match=r"api_key_file=\.\.\.") as refused:
        read_keys(ServeConfig(model="m"))
    assert len(str(refused.value).splitlines()) == 1


def test_a_user_without_a_home_is_refused_in_one_sentence_with_the_way_out(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match=r"without a home folder.*api_key_file=\.\.\."):
        read_keys(ServeConfig(model="m"))


def test_the_home_is_the_one_of_the_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "later"))
    _, path = read_keys(ServeConfig(model="m"))
    assert path.is_relative_to(tmp_path / "later")


def test_a_key_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="must be readable"):
        read_keys(ServeConfig(model="m", api_key_file=str(file)))


def test_a_file_of_hashes_lets_in_who_has_the_key_and_does_not_say_what_it_is():
    keys = keys_of("sk-one requests_per_minute=60\nsk-two concurrent=4 priority=-1\n", "keys")
    text = hashed_lines(keys)
    assert text.splitlines()[0].split()[0] == f"sha256:{hashlib.sha256(b'sk-one').hexdigest()}"
    assert "sk-" not in text
    again = keys_of(text, "hashes")
    assert again == keys
    assert find_key("Bearer sk-two", again) == keys[1]
    # Who reads the hashes has no key.
    assert find_key(f"Bearer {text.split()[0]}", again) is None
    assert find_key(f"Bearer {keys[0].digest}", again) is None


def test_half_a_hash_is_a_key_like_any_other():
    (key,) = keys_of("sha256:abc\n", "keys")
    assert find_key("Bearer sha256:abc", (key,)) == key
