"""A stand-in for the module `tensorrt`: a plan is an ONNX graph, which ONNX Runtime's CPU runs on memory of HostDevice.

It keeps the rules of TensorRT that callers get wrong: shapes within a profile, all addresses set, a cache's output at
the address of its input, a context that is used by one captured graph at a time, plans of another version or GPU,
an engine without weights that runs before it has them.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from blt_runtime.backends.onnx import EXPAND, import_library
from tests.host_device import HostDevice, HostStream

MAGIC = b"FAKEPLAN"
DATA = ("raw_data", "float_data", "int32_data", "int64_data", "external_data")
VERSION, GPU = "10.15.1", "Fake H100"
Profile = Mapping[str, tuple[tuple[int, ...], ...]]


class DataType(enum.Enum):
    FLOAT = TensorProto.FLOAT
    HALF = TensorProto.FLOAT16
    BF16 = TensorProto.BFLOAT16
    INT64 = TensorProto.INT64
    BOOL = TensorProto.BOOL


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class LayerType(enum.Enum):
    ATTENTION_INPUT = 1
    OTHER = 2


class BuilderFlag(enum.Enum):
    STRIP_PLAN = 1
    TF32 = 2
    REFIT_IDENTICAL = 3


class NetworkDefinitionCreationFlag(enum.Enum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 1


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1


class Logger:
    WARNING, ERROR, INTERNAL_ERROR = 2, 1, 0

    def __init__(self, severity: int = WARNING) -> None:
        pass

    def log(self, severity: int, message: str) -> None:
        pass


def module(device: HostDevice, version: str = VERSION, gpu: str = GPU) -> Any:
    """The module, of that version, on that device."""
    here = SimpleNamespace(
        __version__=version,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        LayerType=LayerType,
        BuilderFlag=BuilderFlag,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        MemoryPoolType=MemoryPoolType,
        HardwareCompatibilityLevel=HardwareCompatibilityLevel,
        Logger=Logger,
        ILogger=Logger,
        OnnxParser=OnnxParser,
    )
    here.Refitter, here.OnnxParserRefitter = Refitter, OnnxParserRefitter
    here.Runtime = lambda logger: Runtime(device, f"{version} {gpu}")
    here.Builder = lambda logger: Builder(f"{version} {gpu}", logger)
    return here


def plan_of(model: onnx.ModelProto, profiles: Sequence[Profile], stamp: str = f"{VERSION} {GPU}") -> bytes:
    head = json.dumps({"profiles": [dict(profile) for profile in profiles], "stamp": stamp}).encode()
    return MAGIC + len(head).to_bytes(4, "little") + head + model.SerializeToString()


class Runtime:
    def __init__(self, device: HostDevice, stamp: str) -> None:
        self._device, self._stamp = device, stamp

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if plan[:8] != MAGIC:
            return None
        size = int.from_bytes(plan[8:12], "little")
        head = json.loads(plan[12 : 12 + size])
        if head["stamp"] != self._stamp:
            return None
        return Engine(self._device, onnx.load_from_string(plan[12 + size :]), head["profiles"])


class Engine:
    def __init__(self, device: HostDevice, model: onnx.ModelProto, profiles: Sequence[Any]) -> None:
        self.device, self.profiles, self.contexts = device, profiles, 0
        self.model = model
        self.session: Any = None
        self.missing = [weights.name for weights in model.graph.initializer if _is_stripped(weights)]
        self.refittable = bool(self.missing)
        if not self.missing:
            self.start()
        self.inputs = {value.name: _shape(value) for value in model.graph.input}
        self.outputs = {value.name: _shape(value) for value in model.graph.output}
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        self.aliases = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "TensorScatter" and node.output[0] in self.outputs and node.input[0] in self.inputs
        }
        self.num_io_tensors, self.num_optimization_profiles = len(self.types), len(profiles)
        self.num_layers = len(model.graph.node)

    def start(self) -> None:
        options = import_library().SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(*EXPAND)
        run = import_library().InferenceSession
        self.session = run(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.types[name])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in (self.inputs | self.outputs)[name])

    def get_aliased_input_tensor(self, name: str) -> str:
        return self.aliases.get(name, "")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        fixed = [self.get_tensor_shape(name)] * 3
        return [tuple(shape) for shape in self.profiles[profile].get(name, fixed)]

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._profile = engine, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: HostStream) -> bool:
        self._profile = profile
        return profile < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(least) and all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))
        self._shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.types

    def execute_async_v3(self, stream: HostStream) -> bool:
        engine, shapes, addresses = self._engine, dict(self._shapes), dict(self._addresses)
        if engine.session is None or set(addresses) != set(engine.types) or set(shapes) != set(engine.inputs):
            return False
        if any(addresses[output] != addresses[source] for output, source in engine.aliases.items()):
            return False
        engine.device.request(stream, "run", lambda: _run(engine, shapes, addresses))
        return True


def _run(engine: Engine, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
    feeds = {name: _view(engine, name, shape, addresses[name]).copy() for name, shape in shapes.items()}
    for name in engine.outputs:
        if name not in engine.aliases:  # poisoned until the end
            engine.device.view(addresses[name], 1)[:] = 0xA5
    for name, value in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
        _view(engine, name, value.shape, addresses[name])[...] = value


def _view(engine: Engine, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(engine.types[name]))
    return engine.device.view(address, math.prod(shape) * kind.itemsize).view(kind).reshape(shape)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    sizes = value.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes)


class Builder:
    def __init__(self, stamp: str, logger: Any) -> None:
        self._stamp = stamp

    def create_network(self, flags: int = 0) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Ranges:
        return Ranges()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        names = [value.name for value in network.model.graph.input]
        varying = [
            n
            for n, v in zip(names, network.model.graph.input, strict=True)
            if any(isinstance(s, str) for s in _shape(v))
        ]
        if any(set(varying) - set(profile) for profile in config.profiles) or (varying and not config.profiles):
            return None
        if BuilderFlag.STRIP_PLAN in config.flags:
            if BuilderFlag.REFIT_IDENTICAL not in config.flags:
                return None
            for weights in network.model.graph.initializer:
                _strip(weights)
        return plan_of(network.model, config.profiles, self._stamp)


class Ranges(dict[str, Any]):
    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self[name] = (tuple(least), tuple(usual), tuple(most))


class Config:
    def __init__(self) -> None:
        self.profiles: list[Ranges] = []
        self.flags: set[Any] = {BuilderFlag.TF32}
        self.limits: dict[Any, int] = {}
        self.timing = b""
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def add_optimization_profile(self, profile: Ranges) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    def create_timing_cache(self, content: bytes) -> TimingCache:
        return TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing = cache.content
        return True

    def get_timing_cache(self) -> TimingCache:
        return TimingCache(self.timing + b"t")


def _strip(weights: TensorProto) -> None:
    """Takes the data of floats. Integers are shapes, which TensorRT keeps."""
    if weights.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        for field in DATA:
            weights.ClearField(field)


def _is_stripped(weights: TensorProto) -> bool:
    return math.prod(weights.dims) > 0 and not any(getattr(weights, field) for field in DATA)


class Refitter:
    """Weights for an engine that was built without; it has them after `refit_cuda_engine`."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.found = engine, dict[str, TensorProto]()

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.missing if name not in self.found]

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        for weights in self.engine.model.graph.initializer:
            if weights.name in self.engine.missing:
                weights.CopyFrom(self.found[weights.name])
        self.engine.missing = []
        self.engine.start()
        return True


class _Reader:
    """What reads ONNX graphs, and keeps the errors."""

    def __init__(self) -> None:
        self._errors = list[str]()

    def _load(self, model: bytes, path: str) -> onnx.ModelProto | None:
        """A graph whose weights are in the folder of `path`; None for an error."""
        try:
            found = onnx.load_from_string(model)
            onnx.load_external_data_for_model(found, str(Path(path).parent))
        except Exception as error:
            self._errors.append(str(error))
            return None
        return found

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return _error(self._errors[index])


class OnnxParserRefitter(_Reader):
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        super().__init__()
        self._refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        """Gives the refitter the initializers of a graph whose weights are in the folder of `path`."""
        engine = self._refitter.engine
        wanted = {weights.name: weights for weights in engine.model.graph.initializer}
        given = self._load(model, path)
        if given is None:
            return False
        for weights in given.graph.initializer:
            if weights.name in engine.missing:
                if (weights.data_type, weights.dims) != (wanted[weights.name].data_type, wanted[weights.name].dims):
                    self._errors.append("Failed to set named weights")
                    return False
                self._refitter.found[weights.name] = weights
        if self._refitter.get_missing_weights():
            count = len(engine.missing)
            self._errors.append(f"Only successfully refitted {len(self._refitter.found)} weights out of {count}")
            return False
        return True


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = bytes(content)

    def serialize(self) -> bytes:
        return self.content


class Network:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        return self.model.graph.input[index]

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    def get_output(self, index: int) -> Any:
        return self.model.graph.output[index]

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(type=LayerType.OTHER)


class OnnxParser(_Reader):
    def __init__(self, network: Network, logger: Any) -> None:
        super().__init__()
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        try:
            self._network.model.CopyFrom(onnx.load(path))
        except Exception as error:
            self._errors.append(str(error))
            return False
        return Path(path).exists()

    def parse(self, model: bytes, path: str) -> bool:
        """A graph in memory, whose weights are in the folder of `path`."""
        found = self._load(model, path)
        if found is None:
            return False
        self._network.model.CopyFrom(found)
        return True


def _error(text: str) -> Any:
    return SimpleNamespace(node_operator=lambda: "", node_name=lambda: "", desc=lambda: text)
