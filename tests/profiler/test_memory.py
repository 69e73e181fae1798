from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plora.models import PackedSequences, from_config
from plora.models.presets import preset_config
from plora.models.spec import ModelSpec
from plora.modules.config import AdapterConfig
from plora.modules.packed import pack_adapters
from plora.profiler import MemoryModel, format_bytes
from plora.profiler.memory import GIB, MIB, STATE_BYTES, Saved
from plora.training.loss import hidden_gradient
from plora.training.optimizer import OPTIMIZER_STATES, AdamWConfig, PackedAdamW

SEVEN_B = ModelSpec.preset("Qwen/Qwen2.5-7B")


def test_base_weights_by_precision_and_degree():
    bf16 = MemoryModel(SEVEN_B, "bf16")
    assert bf16.base_bytes() == 2 * SEVEN_B.n_params
    assert bf16.base_bytes(4) == SEVEN_B.n_params // 2
    assert MemoryModel(SEVEN_B, "fp32").base_bytes() == 4 * SEVEN_B.n_params
    # Linears of 6.53e9 elements at just above half a byte, the rest in bf16.
    linears = 28 * sum(layer.in_features * layer.out_features for layer in SEVEN_B.linears)
    nf4 = MemoryModel(SEVEN_B, "bf16", quantize="nf4").base_bytes()
    assert nf4 == pytest.approx(0.516 * linears + 2 * (SEVEN_B.n_params - linears), rel=1e-3)


def test_adapter_state_is_18_bytes_a_parameter_in_bf16_and_16_in_fp32():
    bf16, fp32 = MemoryModel(SEVEN_B, "bf16"), MemoryModel(SEVEN_B, "fp32")
    assert bf16.adapter_params(1) == 2_523_136  # all seven linears of 28 layers
    assert bf16.adapter_bytes(768) / GIB == pytest.approx(32.5, abs=0.05)
    assert bf16.adapter_bytes(8) == 18 * bf16.adapter_params(8)
    assert fp32.adapter_bytes(8) == 16 * fp32.adapter_params(8)
    assert MemoryModel(SEVEN_B, "bf16", moments="8bit").adapter_bytes(8) < 0.7 * bf16.adapter_bytes(8)
    assert bf16.adapter_params(4, ("q_proj", "v_proj")) == 4 * 28 * (3584 + 3584 + 3584 + 512)


@pytest.mark.parametrize("state", OPTIMIZER_STATES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapter_bytes_are_those_that_a_pack_and_its_optimizer_hold(dtype, state):
    assert set(OPTIMIZER_STATES) == set(STATE_BYTES)
    name = "Qwen/Qwen2.5-0.5B"
    base = from_config({**preset_config(name), "num_hidden_layers": 2, "vocab_size": 64}, dtype=dtype)
    configs = [AdapterConfig(rank=16), AdapterConfig(rank=3, target_modules=("q_proj", "down_proj"))]
    packed = pack_adapters(base.module, configs)
    optimizer = PackedAdamW(packed, state)
    for slot in packed.slots:
        optimizer.add(slot, AdamWConfig())
    arena = packed.arena
    shadow = 0 if arena.shadow is arena.weight else arena.shadow.nbytes
    own = 0
    if state == "8bit":
        own = sum(t.nbytes for slot in packed.slots for t in optimizer._moments.tensors(packed.adapters[slot]).values())
    held = sum(flat.nbytes for _, flat in arena.flats()) + shadow + own
    memory = MemoryModel(replace(ModelSpec.preset(name), num_layers=2), dtype, moments=state)
    assert held == pytest.approx(sum(memory.adapter_bytes(c.rank, c.target_modules) for c in configs), rel=1e-3)


def test_tensor_parallelism_keeps_the_factor_on_the_whole_side():
    memory = MemoryModel(SEVEN_B)
    # q_proj is split by output: A whole, B halved; down_proj by input: A halved, B whole.
    assert memory.adapter_params(2, ("q_proj",), 2) == 2 * 28 * (3584 + 3584 // 2)
    assert memory.adapter_params(2, ("down_proj",), 2) == 2 * 28 * (18944 // 2 + 3584)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B"])
def test_activations_equal_what_autograd_saves(name, dtype):
    """The model's own layers with packed adapters: bytes of distinct storages saved, per layer and token."""
    tokens, ranks, lengths = 96, (16, 4), [30, 18, 40, 8]
    saved = [_saved_bytes(name, dtype, layers, ranks, lengths) for layers in (1, 2)]
    per_token = (saved[1] - saved[0]) / tokens
    memory = MemoryModel(ModelSpec.preset(name), dtype, device="cpu")
    assert memory.layer_bytes_per_token(max(ranks)) == pytest.approx(per_token, rel=0.01)


def _saved_bytes(name: str, dtype: str, layers: int, ranks: tuple[int, ...], lengths: list[int]) -> int:
    config = {**preset_config(name), "num_hidden_layers": layers, "vocab_size": 64}
    base = from_config(config, dtype=dtype)
    packed = pack_adapters(base.module, [AdapterConfig(rank=rank) for rank in ranks])
    known = {p.untyped_storage().data_ptr() for p in base.module.parameters()}
    arena = [value for value in vars(packed.arena).values() if isinstance(value, torch.Tensor)]
    known |= {value.untyped_storage().data_ptr() for value in arena}
    sizes: dict[int, int] = {}
    alive = []  # an address is told apart only while its tensor lives

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Tables and offsets are of fixed size; what grows with the tokens is larger.
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    positions = torch.cat([torch.arange(length) for length in lengths])
    sequences = PackedSequences.from_lengths(lengths, torch.device("cpu"))
    half = sum(lengths) // 2
    with packed.route([half, half]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        base.hidden_states(torch.zeros(2 * half, dtype=torch.int64), positions, sequences)
    return sum(sizes.values())


def test_checkpointing_keeps_one_layer_and_every_input():
    plain, recomputed = MemoryModel(SEVEN_B), MemoryModel(SEVEN_B, activation_checkpointing=True)
    layer = plain.layer_bytes_per_token()
    saved = 28 * layer - 28 * 2 * 3584
    assert plain.activation_bytes(1000) - recomputed.activation_bytes(1000) == pytest.approx(1000 * saved, rel=1e-6)
    # The one that is recomputed is there when the logits are gone.
    assert recomputed.in_flight_bytes(1000) - plain.in_flight_bytes(1000) == pytest.approx(1000 * layer, rel=1e-6)
    assert plain.activation_bytes(2000) == pytest.approx(2 * plain.activation_bytes(1000))


@pytest.mark.parametrize("count", [1, 2, 3, True])
def test_peak_with_some_layers_recomputed(count):
    """What is saved at the peak, against all tensors alive over forward and backward."""
    tokens, layers = 96, 4
    sizes = {"num_hidden_layers": layers, "vocab_size": 64, "hidden_size": 112, "intermediate_size": 608}
    base = from_config({**preset_config("Qwen/Qwen2.5-0.5B"), **sizes})
    packed = pack_adapters(base.module, [AdapterConfig(rank=16)])
    peaks = []
    for setting in (False, count):
        base.set_activation_checkpointing(setting)
        sequences = PackedSequences.from_lengths([tokens], torch.device("cpu"))
        with packed.route([tokens]), _Alive() as alive:
            hidden = base.hidden_states(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens), sequences)
            hidden.sum().backward()
        peaks.append(alive.peak)
    memory = MemoryModel(base.spec, "fp32", device="cpu")
    recomputing = replace(memory, activation_checkpointing=count)
    assert recomputing.recomputed_layers == (layers if count is True else count)
    held, less = (each.parts_from_bytes(0, tokens, 16, labels=0).microbatch for each in (memory, recomputing))
    assert peaks[0] - peaks[1] == pytest.approx(held - less, rel=0.05)


class _Alive(TorchDispatchMode):
    """Follows the bytes of all storages made within."""

    def __init__(self):
        super().__init__()
        self.peak, self._made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in known:
                storage = each.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def test_more_layers_than_there_are_is_a_mistake():
    with pytest.raises(ValueError, match="activation_checkpointing = 29: .* has 28 layers"):
        MemoryModel(SEVEN_B, activation_checkpointing=29)


def test_parts_add_up_and_generation_replaces_training():
    memory = MemoryModel(SEVEN_B)
    adapters = [AdapterConfig(rank=8), AdapterConfig(rank=32, target_modules=("q_proj",))]
    parts = memory.parts(adapters, 1024)
    assert parts.adapters == memory.adapter_bytes(8) + memory.adapter_bytes(32, ("q_proj",))
    assert parts.logits > parts.in_flight
    assert parts.allocated == parts.base + parts.adapters + parts.libraries + parts.activations + parts.logits
    assert parts.total == parts.allocated + parts.overhead
    assert memory.adapter_room(parts.total, 1024, 32) == parts.adapters
    generating = memory.parts(adapters, 1024, generation=(512, 4096))
    cache = 512 * 4096 * 2 * 28 * 4 * 128 * 2
    assert generating.generation == cache + 512 * 152064 * 6
    assert generating.allocated == parts.base + parts.adapters + parts.libraries + generating.generation
    assert "generation" in generating.describe()
    assert "activations" not in generating.describe()


def test_logits_and_gradients_in_flight_are_not_alive_together():
    memory = MemoryModel(SEVEN_B, compiled=True)
    few, many = (memory.parts_from_bytes(0, 8192, 8, labels=labels) for labels in (1, 8192))
    assert many.in_flight > many.logits > few.logits
    assert few.allocated == many.allocated == many.base + many.libraries + many.activations + many.in_flight
    assert "logits" not in many.describe()
    assert "logits" in memory.parts_from_bytes(0, 1024, 8).describe()


def test_labelled_rows_alone_have_logits():
    eager, compiled = (MemoryModel(SEVEN_B, loss_chunk=256, compiled=compiled) for compiled in (False, True))
    assert eager.logits_bytes(100) == 100 * 152064 * 10
    assert compiled.logits_bytes(100) == 100 * 152064 * 4
    assert compiled.logits_bytes(100, labels=30) == compiled.logits_bytes(30)
    assert compiled.logits_bytes(100, labels=300) == compiled.logits_bytes(100)
    assert compiled.logits_bytes(100_000) == 256 * 152064 * 4
    assert eager.parts_from_bytes(0, 100, 8, labels=30).logits == eager.logits_bytes(30)


@pytest.mark.parametrize("rows", [24, 64, 80, 200])
def test_chunks_of_logits_that_are_alive_at_once(rows):
    """The loss's own code, but for what torch's logsumexp makes within, which nobody sees: a copy in fp32."""
    chunk, width, vocab = 64, 8, 4096
    weight = torch.randn(vocab, width, dtype=torch.bfloat16)
    hidden, labels = torch.randn(200, width, dtype=torch.bfloat16), torch.arange(rows)
    with _Alive() as alive:
        hidden_gradient(
            lambda x: x @ weight.T, hidden, labels, labels, torch.ones(rows), torch.zeros(rows, dtype=torch.int64), 1,
            chunk=chunk,
        )  # fmt: skip
    memory = MemoryModel(replace(SEVEN_B, vocab_size=vocab), "bf16", device="cpu", loss_chunk=chunk)
    within = 2 * min(rows, chunk) * vocab  # the last bf16 copy takes the place of half of it
    assert alive.peak == pytest.approx(memory.logits_bytes(200, labels=rows) - within, rel=0.06)


def test_graphs_hold_what_their_largest_microbatch_takes():
    graphs = MemoryModel(SEVEN_B, compiled=True, graph_tokens=2048)
    captured = graphs.parts_from_bytes(0, 2048, 16)
    assert graphs.graph_bytes(2048, 16) == graphs.graph_bytes(8192, 16) == captured.microbatch
    for tokens in (512, 2048, 8192):
        without, with_graphs = (
            each.parts_from_bytes(0, tokens, 16) for each in (replace(graphs, graph_tokens=0), graphs)
        )
        assert with_graphs.allocated == without.allocated
        assert with_graphs.total - without.total == graphs.graph_bytes(tokens, 16) > 0
    with pytest.raises(ValueError, match="graph_tokens must not be negative, got -1"):
        MemoryModel(SEVEN_B, graph_tokens=-1)


def test_calibration_scales_what_grows_and_replaces_what_libraries_hold():
    memory = MemoryModel(SEVEN_B)
    corrected = replace(memory, calibration=Saved(activations=1.5, libraries=0))
    assert corrected.activation_bytes(512) == pytest.approx(1.5 * memory.activation_bytes(512), abs=1)
    assert corrected.in_flight_bytes(512) == pytest.approx(1.5 * memory.in_flight_bytes(512), abs=1)
    assert corrected.logits_bytes(512) == memory.logits_bytes(512)
    change = corrected.parts([], 512).total - memory.parts([], 512).total
    assert change == pytest.approx(0.5 * 1.04 * memory.activation_bytes(512) - 96 * MIB, abs=10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "fp16"}, "dtype must be one of bf16, fp32, got 'fp16'"),
        ({"device": "tpu"}, "device must be one of cuda, cpu, got 'tpu'"),
        ({"quantize": "int8"}, "quantize must be one of None, nf4, got 'int8'"),
        ({"moments": "4bit"}, "moments must be one of exact, 8bit, got '4bit'"),
        ({"loss_chunk": 0}, "at least 1 row, got 0"),
    ],
)
def test_unknown_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        MemoryModel(SEVEN_B, **setting)


@pytest.mark.parametrize(
    ("size", "text"), [(14.2 * GIB, "14.2 GiB"), (650 * MIB, "650 MiB"), (1.5 * MIB, "1.5 MiB"), (0, "0 MiB")]
)
def test_sizes_read_well(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"])
def test_compiled_layers_keep_what_the_model_says(name: str) -> None:
    """Counted on what autograd holds after a forward pass of one layer."""
    sizes = {"hidden_size": 112, "intermediate_size": 592, "num_attention_heads": 7, "num_key_value_heads": 1}
    config = {**preset_config(name), **sizes, "num_hidden_layers": 1, "vocab_size": 64}
    base = from_config(config, dtype="bf16")
    tokens, lengths = 96, [48, 48]
    packed = pack_adapters(base.module, [AdapterConfig(rank=16, seed=seed) for seed in range(2)])
    base.compile_layers(backend="aot_eager_decomp_partition")
    x = torch.randn(1, tokens, 112, dtype=torch.bfloat16, requires_grad=True)
    with packed.route(lengths):
        out = base.layers[0](x, mask=PackedSequences.from_lengths(lengths), input_pos=torch.arange(tokens)[None] % 48)
    kept = {
        each.untyped_storage().data_ptr(): each.numel() * each.element_size()
        for each in out.grad_fn.saved_tensors
        if each is not None and tokens in each.shape
    }
    predicted = MemoryModel(base.spec, "bf16", compiled=True).layer_bytes_per_token(max_rank=16)
    assert sum(kept.values()) / tokens == pytest.approx(predicted, rel=0.02)
