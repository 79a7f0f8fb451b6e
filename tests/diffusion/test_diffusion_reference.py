import io
import math

import pytest

from lightning_gap.diffusion import Forecast, ReferenceRun, read_reference
from lightning_gap.diffusion.reference import advice, write_trace

RUN = ReferenceRun("run", (1, 10, 100, 1000, 2000), (1.0, 2.0, 3.0, 2.5, 4.0), (0.1, 0.1, 0.1, 0.1, 0.01), 7)


def test_distance_and_update_between_points():
    assert RUN.distance_at(10) == 2
    assert RUN.distance_at(math.sqrt(1000)) == pytest.approx(2.5)  # half way from 10 to 100 in log t
    assert RUN.update_at(2.5) == pytest.approx(math.sqrt(1000))  # the first time, not the second
    assert RUN.update_at(1.0) == 1
    assert RUN.update_at(3.5) == pytest.approx(math.exp(math.log(1000) + 0.5 / 1.0 * math.log(2)))
    for outside in (RUN.distance_at(0.5), RUN.distance_at(2001), RUN.update_at(0.9), RUN.update_at(4.1)):
        assert math.isnan(outside)


def test_target_is_the_end_of_the_constant_rate():
    assert RUN.target == (1000, 2.5)


def test_written_traces_are_read_back(tmp_path):
    trace = {"updates": [1.0, 2.0], "learning_rate": [0.1, 0.1], "distance": [0.5, 1 / 3], "distance/a": [0.1, 0.2]}
    path = tmp_path / "deep" / "er" / "diffusion.csv"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        write_trace(file, trace, 7)
    for place in (path, tmp_path):
        run = read_reference(str(place))
        assert (run.updates, run.distances, run.learning_rates) == ((1, 2), (0.5, 1 / 3), (0.1, 0.1))
        assert run.parameters == 7


def test_references_that_cannot_be_read_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: name a diffusion"):
        read_reference(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"holds no diffusion\.csv"):
        read_reference(str(tmp_path))
    for text, message in {
        "": "lacks rows",
        "updates,learning_rate\n1,2\n": "lacks distance",
        "updates,learning_rate,distance\n2,0.1,1\n1,0.1,2\n": "updates that do not increase",
        "updates,learning_rate,distance\n1,0.1,nan\n2,0.1,2\n": "distances that are not finite",
    }.items():
        (tmp_path / "diffusion.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_reference(str(tmp_path))
    (tmp_path / "diffusion-v1.csv").write_text("")
    with pytest.raises(ValueError, match=r"holds several runs, name one of them: .*v1\.csv"):
        read_reference(str(tmp_path))


@pytest.mark.parametrize(
    ("distance", "forecast", "words"),
    [
        (1.5, Forecast(500, 300, 900), ["at update 3.", "its 2.5 of update 1000", "450 more updates (250 to 850)"]),
        (1.5, Forecast(math.inf, 300, math.inf), ["will not be reached"]),
        (1.5, Forecast(2e7, 300, math.inf), ["2.0e+07 more updates (250 to ∞)"]),
        (1.5, None, ["no forecast yet"]),
        (0.5, None, ["less far than the reference's first point"]),
        (2.7, None, ["The reference's 2.5 at update 1000 is reached"]),
        (9.0, None, ["farther than the reference ever went", "is reached"]),
    ],
)
def test_advice(distance, forecast, words):
    said = advice(RUN, 50, distance, forecast)
    assert said.startswith(f"After 50 updates the weights have travelled {distance:g}")
    assert all(word in said for word in words), said


def test_csv_has_a_row_for_each_point():
    file = io.StringIO(newline="")
    write_trace(file, {"updates": [1.0], "distance": [2.0]}, 3)
    assert file.getvalue().split() == ["updates,distance,parameters", "1.0,2.0,3"]
