"""The store: writing, reading back, and errors."""

from __future__ import annotations

import threading

import pytest

from leadline import LeadlineError
from leadline.records import Prompt, Response, Verdict
from leadline.store import FILE, Place, Store


def test_written_rows_are_readable_after_closing(tmp_path):
    with Store(tmp_path, write=True) as store:
        ids = store.prompt_ids([Prompt("1", "How?", "d")])
        place = Place(store.cell_id("m", "default", "d", "direct"), ids["d", "1"], 0)
        judge = store.judge_id("refusal", {})
        store.primary_judge("d", judge)
        response = Response("So.", "hm", "length", "", "Sure", 3, 4, 0.5)
        store.put_response(b"k", "{}", response)
        assert store.response(b"k") == response  # not committed yet
        store.put_trial(place, b"k", "truncated")
        store.put_verdict(place, judge, Verdict(True, False, 1.0, categories=("a", "b")))
    with Store(tmp_path) as store:
        assert store.response(b"k") == response
        assert store.stored([place])[place] == (b"k", "truncated", {judge})
        (row,) = store.query("SELECT model, attack, prompt, unsafe, categories FROM outcomes")
        assert row == ("m", "direct", "1", 1, "a,b")


def test_rows_from_many_threads_are_all_written(tmp_path):
    """The writer takes rows while other threads add some: none may be lost."""
    n = 20_000
    with Store(tmp_path, write=True) as store:

        def put(part: int) -> None:
            for i in range(part, n, 4):
                store.put_trial(Place(1, i, 0), b"k", "answered")
                if i % 500 == 0:
                    store._wake.set()

        threads = [threading.Thread(target=put, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.flush()
        assert store.query("SELECT count(*) FROM trials") == [(n,)]


def test_a_new_verdict_replaces_an_unscored_one_and_its_text(tmp_path):
    place = Place(1, 1, 0)
    with Store(tmp_path, write=True) as store:
        store.put_trial(place, b"k", "answered")
        store.put_verdict(place, 1, Verdict(None, text="unreadable"))
        store.flush()
        assert store.stored([place])[place].judged == frozenset()
        store.put_verdict(place, 1, Verdict(False), again=True)
        store.flush()
        assert store.stored([place])[place].judged == {1}
        assert store.query("SELECT text FROM words") == [("",)]


def test_a_folder_without_a_study_is_an_error(tmp_path):
    with pytest.raises(LeadlineError, match="no study at"):
        Store(tmp_path)


def test_a_file_that_is_not_a_store_is_an_error(tmp_path):
    (tmp_path / FILE).write_text("not a database, whatever its name" * 100)
    with pytest.raises(LeadlineError, match="cannot be opened as a store"):
        Store(tmp_path)


def test_a_failed_write_is_raised(tmp_path):
    store = Store(tmp_path, write=True)
    store._put("trials", ("too", "few"))
    with pytest.raises(LeadlineError, match="cannot write to"):
        store.flush()
    with pytest.raises(LeadlineError):
        store.close()
