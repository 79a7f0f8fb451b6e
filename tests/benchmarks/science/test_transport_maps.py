"""What the benchmark of known maps keeps."""

import json

from benchmarks.science import transport_maps


def test_a_row_takes_the_place_of_an_earlier_one_of_the_same_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"section": "w2", "D": 2, "map": "BrenierMap", "seed": seed, "uvp": 1.0, "seconds": 3.0} for seed in (0, 1)]
    for row in (*rows, rows[0] | {"uvp": 2.0, "seconds": 4.0}):
        transport_maps.keep(path, row)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["seed"], row["uvp"]) for row in kept] == [(0, 2.0), (1, 1.0)]
