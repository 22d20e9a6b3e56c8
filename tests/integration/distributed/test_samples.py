"""Generated samples do not depend on the number of ranks or on sharding, and do not change training."""

import pytest
from fits import assert_same, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


def samples(out):
    """Texts as {tag: {step: text}}, and the steps with a picture of the first sample."""
    (file,) = out.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    texts = {
        tag: {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)} for tag in tags
    }
    return texts, [event.step for event in events.Images("samples/1")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_write_the_samples_of_one_process(tiny_backbone, tmp_path, strategy):
    fit(tiny_backbone, tmp_path / "without", epochs=2)
    fit(tiny_backbone, tmp_path / "one", epochs=2, tensorboard=True)
    fit(tiny_backbone, tmp_path / "two", epochs=2, tensorboard=True, strategy=strategy)
    assert_same(tmp_path / "one", tmp_path / "without")
    assert_same(tmp_path / "two", tmp_path / "one")
    texts, pictures = samples(tmp_path / "one")
    assert list(texts) == ["samples/1/text_summary", "samples/2/text_summary"]
    assert all(list(by_step) == pictures == [4, 8] for by_step in texts.values())
    assert len({text for by_step in texts.values() for text in by_step.values()}) >= 2
    assert samples(tmp_path / "two") == (texts, pictures)
