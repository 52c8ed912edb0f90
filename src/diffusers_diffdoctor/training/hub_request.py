# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One call of the Hub's client, run as a process: a job in on standard input, its result or why there is none on standard output.

In a process, because that can be ended whatever it hangs in. The client sets no time limits, its threads keep a process that
wants to end, and what an abandoned thread still sends could replace what a later upload has brought.

The job is a line of JSON: `call`, a method of `HfApi`; `arguments`; `silence`, seconds. The result is one too:
`result`, or `why`, `may_pass` and `retry_after` (seconds). Imports nothing of this package, which takes seconds to load.
"""

import json
import os
import sys
import threading


sys.path.pop(0)  # this folder: its modules are nobody's `import trainer`

from huggingface_hub import HfApi, get_session


class Interrupted(Exception):
    """A request that the Hub may answer otherwise when it is made again; `args[1]` are the seconds it asks to wait."""


def end_with(parent) -> None:
    """End this process when nobody holds the other end of its input any more."""
    parent.read()
    os._exit(1)


def fail_at_once(silence: float) -> None:
    """Let a request fail that nothing moves in for so long, and none be tried again by the client: its caller does that."""
    client = get_session()
    client.timeout = silence
    send = client.send

    def send_once(request, **options):
        what = f"{request.method} {request.url.path}"
        try:
            response = send(request, **options)
        except OSError:  # raised on this side: offline mode
            raise
        except Exception as error:  # of the transport, whose library depends on the client's version
            silent = "Timeout" in type(error).__name__
            why = f"no answer in {silence:g} seconds" if silent else str(error) or type(error).__name__
            raise Interrupted(f"{why} ({what})", 0) from error
        if response.status_code in (408, 423, 425, 429) or response.status_code >= 500:
            raise Interrupted(f"HTTP status {response.status_code} ({what})", retry_after(response.headers))
        return response

    client.send = send_once


def retry_after(headers) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0


def explain(error: BaseException) -> dict:
    """Why there is no result, by the error nearest to the connection, and whether there could be one later."""
    chain = [error]
    while chain[-1].__cause__ is not None and not isinstance(chain[-1], Interrupted):
        chain.append(chain[-1].__cause__)
    last = chain[-1]
    if isinstance(last, Interrupted):
        return {"why": last.args[0], "may_pass": True, "retry_after": last.args[1]}
    answered = next((one for one in chain if getattr(one, "response", None) is not None), None)
    if answered is not None:
        status = answered.response.status_code
        said = getattr(answered, "server_message", None) or answered.response.reason_phrase
        # wrapped, it is the storage's answer: the address that the Hub gave for a file has expired, or was meant for other content
        may_pass = answered is not error or status in (409, 412)
        return {"why": f"HTTP status {status}, {one_line(said)}", "may_pass": may_pass, "retry_after": 0}
    return {
        "why": one_line(str(last)) or type(last).__name__,
        "may_pass": not isinstance(
            error, (ValueError, TypeError, FileNotFoundError, PermissionError, NotADirectoryError)
        ),
        "retry_after": 0,
    }


def one_line(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(". ")


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with, args=[sys.stdin.buffer], daemon=True).start()
    fail_at_once(job["silence"])
    try:
        result = getattr(HfApi(), job["call"])(**job["arguments"])
        answer = {"result": vars(result)}
    except Exception as error:
        answer = explain(error)
    print("\n" + json.dumps(answer, default=str), flush=True)
    os._exit(0)  # threads of the client that still hang are joined otherwise


if __name__ == "__main__":
    main()
