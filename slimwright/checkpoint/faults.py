"""Crash on demand, for the tests of crash safety only: nothing happens unless an environment variable is set.

`SLIMWRIGHT_CRASH_AT="journal:3"` ends the process at the third time that the point `journal` is reached, as kill -9
would (no exception, no cleanup, no flush; exit status 137). `SLIMWRIGHT_COUNT_POINTS=FILE` appends the name of every
point reached to FILE, one a line, so that a test knows how many crashes there are to try.

The points: `write` (before a tile is written to a shard), `torn-write` (half of the tile is written first), `shard`
(before and after a shard is synced), `journal` (before and after a commit), `torn-journal` (half of the commit's bytes
are written first), `rename` (before and after every atomic rename) and `publish` (between the steps of publishing).
"""

import os
from collections.abc import Callable

POINTS = ("write", "torn-write", "shard", "journal", "torn-journal", "rename", "publish")
CRASH_STATUS = 137

_reached: dict[str, int] = {}


def reach(point: str, half_done: Callable[[], object] | None = None) -> None:
    """Note that `point` is reached; crash here if the environment says so, after running `half_done` (a torn write)."""
    crash_at = os.environ.get("SLIMWRIGHT_CRASH_AT")
    count_file = os.environ.get("SLIMWRIGHT_COUNT_POINTS")
    if crash_at is None and count_file is None:
        return
    assert point in POINTS, point
    _reached[point] = _reached.get(point, 0) + 1
    if count_file is not None:
        with open(count_file, "a", encoding="utf-8") as file:
            file.write(point + "\n")
    if crash_at == f"{point}:{_reached[point]}":
        if half_done is not None:
            half_done()
        os._exit(CRASH_STATUS)
