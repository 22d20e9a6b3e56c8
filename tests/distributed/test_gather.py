"""Objects and failures of all ranks; test_parity.py and test_full_disk.py run them on two."""

import pytest

from gatera_lightning.distributed.gather import gather_objects, run_on_every_rank


def test_gather_objects_without_process_group_returns_own_value():
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_run_on_every_rank_returns_the_message_on_one_line():
    def fail():
        raise OSError("no space\n left")

    assert run_on_every_rank(fail, catch=(OSError,)) == "no space left"
    assert run_on_every_rank(lambda: None, catch=(OSError,)) is None


def test_run_on_every_rank_raises_other_errors():
    def fail():
        raise KeyError("name")

    with pytest.raises(KeyError):
        run_on_every_rank(fail, catch=(OSError,))
