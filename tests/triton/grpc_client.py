"""A gRPC client of a Triton server: `python grpc_client.py HOST:PORT '[{"PROMPT": "Once", "STREAM": true}, ...]'`.

It sends all requests over one stream and prints the responses to each as JSON. `"cancel": N` in a request closes the
stream after N responses to it. It runs in the interpreter of nvidia-pytriton and imports nothing of this project.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

KINDS = {"PROMPT": "BYTES", "MAX_TOKENS": "INT32", "TEMPERATURE": "FP32", "SEED": "INT64"}


def tensors(request: dict[str, Any]) -> list[Any]:
    import numpy as np
    import tritonclient.grpc as grpc
    from tritonclient.utils import triton_to_np_dtype

    made = []
    for name, value in request.items():
        kind = KINDS.get(name, "BOOL")
        data = [value.encode() if isinstance(value, str) else value]
        made.append(grpc.InferInput(name, [1], kind))
        made[-1].set_data_from_numpy(np.array(data, np.object_ if kind == "BYTES" else triton_to_np_dtype(kind)))
    return made


def answer(result: Any) -> dict[str, Any]:
    values = {output.name: result.as_numpy(output.name).tolist() for output in result.get_response().outputs}
    values["final"] = result.get_response().parameters["triton_final_response"].bool_param
    for name in ("TEXT", "FINISH_REASON"):
        values[name] = values[name][0].decode()
    return values


def main(address: str, text: str) -> None:
    import tritonclient.grpc as grpc

    requests = json.loads(text)
    client, arrived = grpc.InferenceServerClient(address), queue.SimpleQueue[Any]()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    found: list[list[dict[str, Any]]] = [[] for _ in requests]
    cancels = [request.pop("cancel", 0) for request in requests]
    for number, request in enumerate(requests):
        client.async_stream_infer("small", tensors(request), request_id=str(number))
    open_requests = set(range(len(requests)))
    while open_requests:
        result, error = arrived.get(timeout=60)
        if error is not None:
            number = min(open_requests)  # the error of a stream does not name its request
            found[number].append({"error": error.message(), "final": True})
        else:
            number = int(result.get_response().id)
            found[number].append(answer(result))
        if cancels[number] and len(found[number]) == cancels[number]:
            client.stop_stream(cancel_requests=True)
            break
        if found[number][-1]["final"]:
            open_requests.discard(number)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
