"""Replace masks and the Linear layers behind them by the extension's operations."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino.utils.node_factory import NodeFactory

from actsparse.errors import ActsparseError
from actsparse.openvino.build import explain_portable, extension_path
from actsparse.openvino.compensations import multiply_weights
from actsparse.openvino.feed_forward import FeedForward, find_feed_forward, find_gated
from actsparse.openvino.graph_masks import GraphMask, find_masks, group_by_source
from actsparse.openvino.linear import Linear, find_bias, find_head, find_linears
from actsparse.openvino.masks import read_records
from actsparse.openvino.packing import PLAIN_LAYOUT, PackedSite, pack_plain, pack_rows, pack_site
from actsparse.openvino.toolchain import BuildError
from actsparse.openvino.weights import UnsupportedWeightsError, read_weights


@dataclass(frozen=True)
class AcceleratedSite:
    """Layers that run as one operation.

    :param layers: Their module names.
    :param operation: SparseLinear, SparseHead, SparseFeedForward or GatedFeedForward.
    :param weight_type: u8, u4, f16 or bf16.
    :param is_masked: Whether any of them has a mask.
    """

    layers: tuple[str, ...]
    operation: str
    weight_type: str
    is_masked: bool = True


@dataclass(frozen=True)
class KeptSite:
    """Layers that stay as they were.

    :param layers: Their module names.
    :param reason: Why.
    """

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did.

    :param accelerated: Sites that the kernel runs, with masks or without.
    :param kept: Masked sites that it does not run.
    """

    accelerated: tuple[AcceleratedSite, ...]
    kept: tuple[KeptSite, ...]

    @property
    def masked(self) -> tuple[AcceleratedSite, ...]:
        """The masked sites that the kernel runs."""
        return tuple(site for site in self.accelerated if site.is_masked)


OPERATIONS = {"SparseLinear", "SparseHead", "SparseFeedForward", "GatedFeedForward"}
# Which layers without a mask run on the kernel too.
DENSE = ("none", "head", "all")

# What the kernel gains at no sparsity at all decides this: see benchmarks/README.md.
MIN_SPARSITY = 0.0


def accelerate(
    model: ov.Model, *, exact: bool = False, min_sparsity: float = MIN_SPARSITY, dense: str = "head"
) -> Acceleration:
    """Make masked layers skip the weights that their masks make useless, in place.

    The layers that read one tensor through equal masks become one operation of the extension, and a feed-forward
    network without biases becomes one as a whole. Decoding a token then reads only the weights of kept channels;
    several tokens share one reading of them. Without a compiler the model stays as it is, and one warning says so.

    :param model: An OpenVINO model with masks: sparsified there, or converted from a sparsified torch model.
    :param exact: Multiply with activations of 24 bits (three INT8 terms), as exact as f32, instead of quantising them
        to INT8 as OpenVINO's own compressed layers do by default.
    :param min_sparsity: Sites with a lower target stay as they are, where the model records its targets.
    :param dense: Which INT8 layers without a mask run on the kernel too: `head`, the output head; `all`; or `none`.
    :return: Which layers the kernel runs, and why the other masked ones stay.
    :raises ActsparseError: If `min_sparsity` is not in [0, 1], or `dense` is none of these words.
    """
    if not 0 <= min_sparsity <= 1:
        message = f"min_sparsity must be in [0, 1], not {min_sparsity}"
        raise ActsparseError(message)
    if dense not in DENSE:
        message = f"dense must be one of {', '.join(DENSE)}, not {dense!r}"
        raise ActsparseError(message)
    masks = find_masks(model)
    try:
        library = extension_path()
    except BuildError as error:
        explain_portable(error)
        return Acceleration((), tuple(KeptSite(_names(mask.linears), str(error)) for mask in masks))
    kept: list[KeptSite] = []
    sites: list[_Site] = []
    by_name = {linear.name: linear for linear in find_linears(model)}
    allocated = {name: s for name, mask in read_records(model).items() if (s := mask.allocation) is not None}
    head = _find_head(model, masks, by_name)
    for same in _equal_masks([mask for mask in masks if not mask.is_of_rows]):
        linears = tuple(linear for mask in same for linear in mask.linears)
        reason = _reason_to_stay(linears, allocated, min_sparsity)
        try:
            if reason is None:
                sites.append(_pack(linears, head, same))
        except UnsupportedWeightsError as error:
            reason = str(error)
        if reason is not None:
            kept.append(KeptSite(_names(linears), reason))
    for linears in _unmasked(model, masks, dense, head):
        with contextlib.suppress(UnsupportedWeightsError):
            sites.append(_pack(linears, head))
    factory = NodeFactory()
    factory.add_extension(str(library))
    accelerated: list[AcceleratedSite] = []
    for mask in masks:
        if mask.is_of_rows:
            try:
                accelerated.append(_replace_gated(by_name, mask, sites, factory, exact))
            except UnsupportedWeightsError as error:
                kept.append(KeptSite(_names(mask.linears), str(error)))
    accelerated += _replace_sites(by_name, sites, factory, exact)
    return Acceleration(tuple(accelerated), tuple(kept))


def is_accelerated(model: ov.Model) -> bool:
    """Tell whether a model has operations of the extension."""
    return any(node.get_type_name() in OPERATIONS for node in model.get_ops())


@dataclass(frozen=True)
class _Site:
    """Layers to multiply together.

    :param linears: In the order of the operation's outputs.
    :param source: What the mask reads.
    :param packed: Their weights, thresholds and biases.
    :param ends: What the operation's outputs take the place of: the layers', or where their biases are added.
    :param tokens: Which tokens are masked, `all` or `decode`.
    :param is_masked: Whether any are.
    """

    linears: tuple[Linear, ...]
    source: ov.Output
    packed: PackedSite
    ends: tuple[ov.Output, ...]
    tokens: str = "all"
    is_masked: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the weights stay in the model's own constant."""
        return self.packed.layout == PLAIN_LAYOUT

    def constant(self) -> ov.Output:
        """Return the operation's input that holds the site's bytes."""
        return ops.constant(self.packed.data).output(0)

    def attributes(self, prefix: str = "") -> dict[str, object]:
        """Return what the operation needs to know of the site."""
        attributes = {**self.packed.attributes(), "is_decode_only": self.tokens == "decode"}
        return {prefix + name: value for name, value in attributes.items()}


def _names(linears: tuple[Linear, ...]) -> tuple[str, ...]:
    return tuple(linear.module_name for linear in linears)


def _equal_masks(masks: list[GraphMask]) -> list[list[GraphMask]]:
    """Group masks with equal thresholds on one source: converted torch models have one for each layer."""
    groups: dict[tuple[str, int, bytes, str], list[GraphMask]] = {}
    for mask in masks:
        source = mask.source
        key = (source.get_node().get_friendly_name(), source.get_index(), mask.threshold.tobytes(), mask.tokens)
        groups.setdefault(key, []).append(mask)
    return list(groups.values())


def _reason_to_stay(linears: tuple[Linear, ...], targets: dict[str, float], min_sparsity: float) -> str | None:
    """Return why the kernel cannot or should not run these layers, or None."""
    known = [targets[linear.module_name] for linear in linears if linear.module_name in targets]
    if known and max(known) < min_sparsity:
        return f"a target of {max(known):g} is below min_sparsity={min_sparsity:g}"
    for linear in linears:
        source = linear.source
        if linear.is_input_transposed or linear.input_port != 0:
            return f"{linear.name} does not multiply its input by rows"
        if source.get_element_type() != ov.Type.f32:
            return f"{linear.name} has {source.get_element_type().get_type_name()} activations; the kernel takes f32"
        if source.get_partial_shape().rank.is_dynamic:
            return f"{linear.name} has an input of unknown rank"
    return None


def _find_head(model: ov.Model, masks: list[GraphMask], linears: dict[str, Linear]) -> Linear | None:
    """Return the output head; a model that ends with a feed-forward network has none."""
    head = find_head(model)
    if head is None:
        return None
    of_inputs = [mask for mask in masks if not mask.is_of_rows]
    found = (mask.source for mask in of_inputs for linear in mask.linears if linear.name == head.name)
    source = next(found, head.source)
    gated = [find_gated(mask, linears) for mask in masks if mask.is_of_rows]
    ends_network = find_feed_forward(source, linears) or any(network and network.hidden == source for network in gated)
    return None if ends_network else head


def _unmasked(model: ov.Model, masks: list[GraphMask], dense: str, head: Linear | None) -> Iterator[tuple[Linear, ...]]:
    """Yield the INT8 layers without a mask that are to move too, those that read the same output together."""
    masked = {linear.name for mask in masks for linear in mask.linears}
    wanted = [head] if dense == "head" and head else find_linears(model) if dense == "all" else []
    for linears in group_by_source([linear for linear in wanted if linear.name not in masked]):
        types = {linear.constant.get_output_element_type(0).get_type_name() for linear in linears}
        if types <= {"u8", "i8"} and _reason_to_stay(tuple(linears), {}, 0.0) is None:
            yield tuple(linears)


def _pack(linears: tuple[Linear, ...], head: Linear | None, masks: Sequence[GraphMask] = ()) -> _Site:
    """Pack layers of one source, and their equal masks; without any everything passes."""
    threshold = np.broadcast_to(masks[0].threshold if masks else np.float32(-1.0), [linears[0].in_features])
    weights = [read_weights(linear) for linear in linears]
    is_head = head is not None and head.is_plain and [linear.name for linear in linears] == [head.name]
    packed = pack_plain(weights[0], threshold) if is_head else pack_site(weights, threshold)
    tokens = masks[0].tokens if masks else "all"
    # A layer's own bias is there in runs that are not masked, too.
    found = [find_bias(linear) if tokens == "all" else None for linear in linears]
    biases = [
        np.zeros(linear.out_features, np.float32) if bias is None else bias.values
        for linear, bias in zip(linears, found, strict=True)
    ]
    places = {linear.name: number for number, linear in enumerate(linears)}
    for mask in masks:
        if mask.compensation.bias is not None:
            products = multiply_weights(mask.linears, [mask.compensation.bias.numpy()[None]])
            for linear, product in zip(mask.linears, products, strict=True):
                biases[places[linear.name]] = biases[places[linear.name]] + product.reshape(-1)
    if any(bias.any() for bias in biases):
        packed = packed.with_bias(np.concatenate(biases))
    ends = tuple(
        linear.node.output(0) if bias is None else bias.end for linear, bias in zip(linears, found, strict=True)
    )
    source = masks[0].source if masks else linears[0].source
    return _Site(linears, source, packed, ends, tokens, is_masked=bool(masks))


def _replace_gated(
    linears: dict[str, Linear], mask: GraphMask, sites: list[_Site], factory: NodeFactory, exact: bool
) -> AcceleratedSite:
    """Put one operation in the place of a network whose rows are masked; its two other sites leave the list."""
    gated = find_gated(mask, linears)
    if gated is None:
        message = f"{mask.linears[0].name} is not part of a gated feed-forward network that can run as one operation"
        raise UnsupportedWeightsError(message)
    gate = _site_of((gated.gate,), sites)
    readers = [linear for linear in linears.values() if linear.source == gated.hidden]
    down = next((site for site in sites if site.source == gated.hidden), None) or _site_of(tuple(readers), sites)
    reason = _reason_to_stay((gated.up,), {}, 0.0)
    if reason is None and (gate.source != gated.up.source or len(down.linears) != 1):
        reason = f"{gated.up.name} and {gated.gate.name} do not read the same tensor, or several layers the product"
    if reason is not None:
        raise UnsupportedWeightsError(reason)
    threshold = np.broadcast_to(mask.threshold, [gated.up.out_features])
    ends = (gated.up.node.output(0),)
    up = _Site((gated.up,), gate.source, pack_rows(read_weights(gated.up), threshold), ends, mask.tokens)
    attributes = {
        **gate.attributes("gate_"),
        **up.attributes("up_"),
        **down.attributes("down_"),
        "activation": gated.activation,
        "is_exact": exact,
    }
    node = factory.create(
        "GatedFeedForward", [gate.source, gate.constant(), up.constant(), down.constant()], attributes
    )
    sites[:] = [site for site in sites if site is not gate and site is not down]
    return _replace_outputs(node, down, up, gate)


def _site_of(linears: tuple[Linear, ...], sites: list[_Site]) -> _Site:
    """Return the site of some layers; what has no mask becomes a site whose mask lets everything pass."""
    names = {linear.name for linear in linears}
    for site in sites:
        if names & {linear.name for linear in site.linears}:
            if len(site.linears) != len(names):
                message = f"{linears[0].name} shares its mask with other layers"
                raise UnsupportedWeightsError(message)
            return site
    if len(linears) != 1:
        message = "the product of gate and up is not read by one layer alone"
        raise UnsupportedWeightsError(message)
    return _pack(linears, None)


def _replace_sites(
    linears: dict[str, Linear], sites: list[_Site], factory: NodeFactory, exact: bool
) -> Iterator[AcceleratedSite]:
    """Put operations in the sites' places; a feed-forward network's two sites become one."""
    inner = {frozenset(linear.name for linear in site.linears): site for site in sites}
    networks: list[tuple[_Site, FeedForward, _Site]] = []
    for site in sites:
        network = find_feed_forward(site.source, linears, site.tokens) if len(site.linears) == 1 else None
        before = inner.get(frozenset(linear.name for linear in network.inner)) if network else None
        if network and before:
            networks.append((before, network, site))
    fused = {id(site) for before, _, down in networks for site in (before, down)}
    for before, network, down in networks:
        yield _replace_network(before, network, down, factory, exact)
    for site in sites:
        if id(site) not in fused:
            attributes = {**site.attributes(), "is_exact": exact}
            operation = "SparseHead" if site.is_plain else "SparseLinear"
            weights = [site.linears[0].constant.output(0)] if site.is_plain else []
            node = factory.create(operation, [site.source, site.constant(), *weights], attributes)
            yield _replace_outputs(node, site)


def _replace_network(
    before: _Site, network: FeedForward, down: _Site, factory: NodeFactory, exact: bool
) -> AcceleratedSite:
    attributes = {
        **before.attributes("in_"),
        **down.attributes("down_"),
        "activation": network.activation,
        "is_exact": exact,
    }
    node = factory.create("SparseFeedForward", [before.source, before.constant(), down.constant()], attributes)
    return _replace_outputs(node, down, before)


def _replace_outputs(node: ov.Node, *sites: _Site) -> AcceleratedSite:
    """Let an operation give what its last site, the first here, gave."""
    node.set_friendly_name(f"{sites[0].linears[0].name}/{node.get_type_name()}")
    for end, output in zip(sites[0].ends, node.outputs(), strict=True):
        output.get_tensor().set_names(end.get_tensor().get_names())
        for reader in list(end.get_target_inputs()):
            reader.replace_source_output(output)
    names = tuple(name for site in reversed(sites) for name in _names(site.linears))
    is_masked = any(site.is_masked for site in sites)
    return AcceleratedSite(names, node.get_type_name(), sites[0].packed.type, is_masked)
