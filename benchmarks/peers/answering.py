"""How a decoder of another library is asked for times: lines of JSON on standard input, seconds on standard output."""

import json
import sys


def serve(decoder) -> None:
    """Say ``"ready"``, then answer each ``{"what": "decode", "prefill" or "first", "batch": N}``."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        works = {"prefill": decoder.prefill, "first": decoder.first}
        seconds = works[asked["what"]]() if asked["what"] in works else decoder.decode(asked["batch"])
        print(json.dumps(seconds), flush=True)
