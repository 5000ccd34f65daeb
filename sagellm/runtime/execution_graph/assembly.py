"""A graph in the making: adds nodes one by one and works out the shapes of what they give."""

from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.ir import AnyOperator, ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import AllReduce
from sagellm.runtime.execution_graph.tensors import NUM_SAMPLED, NUM_TOKENS, Shard, Tensor, WeightSource, WeightSpec


class GraphAssembly:
    """Collects tensors, weights and nodes in the order in which they are added."""

    def __init__(self, config: ModelConfig, tp: int) -> None:
        """Raises ``ValueError`` where ``tp`` does not divide the model's heads."""
        config.shape.check_tp(tp)
        self.config = config
        self.tp = tp
        self._tensors: dict[str, Tensor] = {}
        self._weights: dict[str, WeightSpec] = {}
        self._nodes: list[Node] = []
        for name, dim in (("token_ids", NUM_TOKENS), ("positions", NUM_TOKENS), ("sampled_rows", NUM_SAMPLED)):
            self._tensors[name] = Tensor(name, (dim,), "int64", "input")

    def weight(self, name: str, *sources: WeightSource, shape: tuple[int, ...] | None = None) -> str:
        """A weight made of ``sources``; where there is one of that name already, that one."""
        if name not in self._tensors:
            first = sources[0].rank_shape
            joined = (sum(source.rank_shape[0] for source in sources), *first[1:])
            self._weights[name] = WeightSpec(name, shape or joined, sources)
            self._tensors[name] = Tensor(name, shape or joined, self.config.dtype, "weight")
        return name

    def whole(self, name: str, *shape: int) -> str:
        """A weight that every rank holds all of."""
        return self.weight(name, WeightSource(name, shape))

    def sharded(self, name: str, shape: tuple[int, ...], dim: int, num_parts: int | None = None) -> str:
        """A weight of which each rank holds a part along ``dim``; ``num_parts`` is ``tp`` where not given."""
        return self.weight(name, WeightSource(name, shape, self.shard(dim, num_parts)))

    def shard(self, dim: int, num_parts: int | None = None) -> Shard | None:
        return None if self.tp == 1 else Shard(dim, num_parts or self.tp)

    def add(self, name: str, operator: AnyOperator, *inputs: str, layer: int | None = None) -> str:
        """Adds a node with one output, which has the node's name."""
        self._add(name, operator, inputs, (name,), layer)
        return name

    def add_many(
        self, name: str, operator: AnyOperator, *inputs: str, outputs: tuple[str, ...] = (), layer: int | None = None
    ) -> None:
        """Adds a node with any number of outputs."""
        self._add(name, operator, inputs, outputs, layer)

    def all_reduce(self, name: str, layer: int | None = None) -> str:
        """The sum over ranks of the tensor ``name``; with one rank, that tensor."""
        return name if self.tp == 1 else self.add(f"{name}.all_reduce", AllReduce(), name, layer=layer)

    def finish(self, *outputs: str) -> ExecutionGraph:
        return ExecutionGraph(
            model=self.config.shape.name,
            num_layers=self.config.shape.num_layers,
            tp=self.tp,
            inputs=tuple(name for name, tensor in self._tensors.items() if tensor.kind == "input"),
            outputs=outputs,
            tensors=tuple(self._tensors.values()),
            weights=tuple(self._weights.values()),
            nodes=tuple(self._nodes),
        )

    def _add(
        self, name: str, operator: AnyOperator, inputs: tuple[str, ...], outputs: tuple[str, ...], layer: int | None
    ) -> None:
        types = operator.output_types([self._tensors[key] for key in inputs])
        for output, (shape, dtype) in zip(outputs, types, strict=True):
            self._tensors[output] = Tensor(output, shape, dtype, "activation")
        self._nodes.append(Node(name, operator, inputs, outputs, layer))
