"""What the ingress knows of workers is what they said last, what it sent them since, and how old that is."""

from __future__ import annotations

import hashlib

import pytest
from tests.unit.serve.loads import worker

from farspan.kv.prefix import PrefixScope, chain_of
from farspan.serve.load import MOST_NAMES, LoadTable, digest, names_in


def names(count: int, start: int = 0) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(start, start + count)]


def test_a_worker_that_was_not_heard_of_for_a_while_is_not_fresh_until_it_speaks_again():
    table = LoadTable(stale_s=3.0)
    table.put(worker("a"), 0.0, 0.1)
    table.put(worker("b"), 2.0, 2.1)
    assert [w.worker for w in table.fresh(3.0)] == ["a", "b"]
    assert [w.worker for w in table.fresh(3.5)] == ["b"]
    table.put(worker("a"), 4.0, 4.0)
    assert [w.worker for w in table.fresh(4.5)] == ["a", "b"]
    assert table.fresh(1e9) == []


def test_an_answer_that_comes_late_does_not_replace_a_newer_one():
    table = LoadTable(stale_s=3.0)
    table.put(worker("a", queue_tokens=7), 2.0, 2.1)
    table.put(worker("a", queue_tokens=900), 1.0, 2.2)
    assert table.fresh(2.2)[0].queue_tokens == 7


def test_what_was_sent_counts_until_a_snapshot_that_was_asked_for_later():
    table = LoadTable(stale_s=3.0)
    table.put(worker("a", queue_tokens=100, num_waiting=1), 0.0, 0.0)
    table.sent("a", 50, 1.0)
    table.sent("a", 30, 2.0)
    table.sent("nobody", 30, 2.0)
    (seen,) = table.fresh(2.0)
    assert (seen.queue_tokens, seen.num_waiting) == (180, 3)
    # Asked between the two: it has the first, and may not have the second.
    table.put(worker("a", queue_tokens=150, num_waiting=2), 1.5, 2.5)
    (seen,) = table.fresh(2.5)
    assert (seen.queue_tokens, seen.num_waiting) == (180, 3)
    table.put(worker("a"), 3.0, 3.0)
    assert table.fresh(3.0)[0].queue_tokens == 0


def test_the_longest_beginning_that_a_worker_has_is_found_by_the_names_of_its_pages():
    table, prompt = LoadTable(stale_s=3.0), names(6)
    for name, has in (("a", prompt[:2]), ("b", prompt[:5]), ("c", prompt[1:]), ("d", names(9, 100))):
        table.put(worker(name, prefixes=digest(has), prefix_version=1), 0.0, 0.0)
    assert table.found(iter(prompt), 16) == {"a": 32, "b": 80}
    assert table.found(iter(()), 16) == {}


def test_names_are_kept_while_a_worker_says_they_are_the_same_and_gone_with_its_process():
    table, prompt = LoadTable(stale_s=3.0), names(3)
    assert table.version("a") == -1
    table.put(worker("a", prefixes=digest(prompt), prefix_version=4), 0.0, 0.0)
    table.put(worker("a", prefixes=None, prefix_version=4), 1.0, 1.0)
    assert table.version("a") == 4
    assert table.found(iter(prompt), 16) == {"a": 48}
    table.put(worker("a", incarnation="2", prefixes=None), 2.0, 2.0)
    assert table.found(iter(prompt), 16) == {}
    table.put(worker("a", prefixes=digest(prompt)), 3.0, 3.0)
    table.forget("a")
    assert (len(table), table.found(iter(prompt), 16)) == (0, {})


def test_names_are_not_made_beyond_what_anybody_has():
    table, prompt = LoadTable(stale_s=3.0), names(100)
    table.put(worker("a", prefixes=digest(prompt[:2])), 0.0, 0.0)
    made = []

    def making():
        for name in prompt:
            made.append(name)
            yield name

    assert table.found(making(), 16) == {"a": 32}
    assert len(made) == 3


def test_only_the_newest_names_travel():
    many = names(MOST_NAMES + 5)
    found = names_in(digest(many))
    assert len(found) == MOST_NAMES
    assert int.from_bytes(many[4][:8], "little") not in found
    assert int.from_bytes(many[-1][:8], "little") in found
    with pytest.raises(ValueError, match="whole, got 9 bytes"):
        names_in(bytes(9))


def test_a_name_depends_on_all_tokens_before_and_on_the_scope():
    tokens = list(range(40))
    one = chain_of("layout", 16, PrefixScope(salt="s"))
    other = chain_of("layout", 16, PrefixScope(salt="t"))
    changed = chain_of("layout", 16, PrefixScope(salt="s"))
    assert one.name(1, tokens) != other.name(1, tokens)
    assert one.name(1, tokens) != changed.name(1, [7, *tokens[1:]])
    assert one.name(2, tokens) is None
