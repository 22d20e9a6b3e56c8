"""Gate histograms are summed over ranks: two ranks write what one process writes."""

import pytest
from fits import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


def gate_events(out):
    """Histograms and scalars as {tag: {step: value}}, and the steps with a picture, of the event file."""
    (file,) = out.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    histograms = {
        tag: {e.step: e.histogram_value for e in events.Histograms(tag)}
        for tag in events.Tags()["histograms"]
    }
    gates = [tag for tag in events.Tags()["scalars"] if tag.startswith("gate")]
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in gates}
    return histograms, scalars, [event.step for event in events.Images("gate_shares/layers")]


def test_ddp_writes_the_histograms_of_one_process(tiny_backbone, tmp_path):
    """Two epochs of four steps of different sizes; a histogram every three steps, also across epochs."""
    one, two = tmp_path / "one", tmp_path / "two"
    fit(tiny_backbone, one, epochs=2, tensorboard=True)
    fit(tiny_backbone, two, epochs=2, tensorboard=True, strategy="ddp")
    (histograms, scalars, pictures), (expected, expected_scalars, expected_pictures) = (
        gate_events(two),
        gate_events(one),
    )
    assert pictures == expected_pictures == [3, 6]
    assert histograms.keys() == expected.keys()
    assert len(expected) == 2 * (1 + 5 + 2 + 10)
    for tag, by_step in expected.items():
        assert list(histograms[tag]) == list(by_step) == [3, 6]
        for step, value in by_step.items():
            found = histograms[tag][step]
            assert (found.bucket, found.bucket_limit, found.num) == (
                value.bucket,
                value.bucket_limit,
                value.num,
            ), (tag, step)
            assert (found.sum, found.sum_squares) == pytest.approx(
                (value.sum, value.sum_squares), rel=1e-6
            ), (tag, step)
    assert scalars.keys() == expected_scalars.keys()
    for tag, values in expected_scalars.items():
        assert scalars[tag] == pytest.approx(values, rel=1e-6, abs=1e-7), tag
