"""The rank grid: which rank trains, serves or hosts, and which ranks make an engine.

A node's local ranks are its devices, in order, and then its host rank. With D devices in all, device d is
device d % G of node d // G. Colocated, every device trains and serves; else the first
`actor_num_gpus_per_node` devices of the first `actor_num_nodes` nodes train and all others serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from rlmono.config.schema import Config
from rlmono.world.launch import WorldError


@dataclass(frozen=True)
class RankGrid:
    """Ranks are global ranks. `engines[i]` lists the ranks of engine i, the first of which talks to its host."""

    nodes: int
    ranks_per_node: int
    trainers: tuple[int, ...]
    engines: tuple[tuple[int, ...], ...]
    tp: int
    pp: int
    cp: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def hosts(self) -> tuple[int, ...]:
        return tuple((n + 1) * self.ranks_per_node - 1 for n in range(self.nodes))

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(r for r in range(self.world_size) if not self.is_host(r))

    @property
    def engine_ranks(self) -> tuple[int, ...]:
        return tuple(r for e in self.engines for r in e)

    @property
    def data_parallel_size(self) -> int:
        return len(self.trainers) // (self.tp * self.pp * self.cp)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def host_of(self, rank: int) -> int:
        return self.hosts[self.node_of(rank)]

    def is_host(self, rank: int) -> bool:
        return rank % self.ranks_per_node == self.ranks_per_node - 1

    def engine_of(self, rank: int) -> Optional[int]:
        """Index of the engine that the rank is part of."""
        return next((i for i, e in enumerate(self.engines) if rank in e), None)

    def pool_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that share a default process group with this one."""
        if self.is_host(rank):
            return self.hosts
        if set(self.trainers) == set(self.engine_ranks) or not self.engines:
            return self.devices
        return self.trainers if rank in self.trainers else self.engine_ranks

    def role_of(self, rank: int) -> str:
        if self.is_host(rank):
            return "host, controller" if rank == self.hosts[0] else "host"
        names = [n for n, ranks in (("trainer", self.trainers), ("engine", self.engine_ranks)) if rank in ranks]
        return " + ".join(names)

    @staticmethod
    def for_config(config: Config, nodes: Optional[int], ranks_per_node: Optional[int]) -> RankGrid:
        """The grid of a world of `nodes` x `ranks_per_node` ranks, or, where they are None, of the world that the config asks for.

        Raises WorldError when the world does not fit the config; the message says what to start instead.
        """
        if nodes is None or ranks_per_node is None:
            nodes, ranks_per_node = _wanted_world(config)
        per_node = ranks_per_node - 1
        if per_node < 1:
            raise WorldError("Each node needs at least two ranks: its devices, and one host rank. Start `--nproc-per-node <devices + 1>`.")
        device_rank = [n * ranks_per_node + d for n in range(nodes) for d in range(per_node)]
        trainers, servers = _deal(config, nodes, per_node, device_rank)
        engines = _engines(config, servers, per_node)
        tp, pp, cp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.context_parallel_size
        if len(trainers) % (tp * pp * cp):
            raise WorldError(f"{len(trainers)} training ranks are no multiple of tensor {tp} x pipeline {pp} x context {cp} parallel "
                             f"= {tp * pp * cp}.")
        return RankGrid(nodes, ranks_per_node, tuple(trainers), engines, tp, pp, cp)

    def lines(self) -> list[str]:
        """The grid as text, a line a rank."""
        layout = f"dp {self.data_parallel_size} x tp {self.tp} x pp {self.pp} x cp {self.cp}"
        head = f"{self.nodes} node(s) x {self.ranks_per_node} ranks; {len(self.trainers)} train ({layout})"
        if self.engines:
            head += f"; {len(self.engines)} engine(s) of {len(self.engines[0])}"
        rows = [head]
        for r in range(self.world_size):
            engine = self.engine_of(r)
            rows.append(f"rank {r:<4} node {self.node_of(r):<3} {self.role_of(r)}" + (f" {engine}" if engine is not None else ""))
        return rows


def _wanted_world(config: Config) -> tuple[int, int]:
    per_node = config.actor_num_gpus_per_node or 1
    train = config.actor_num_nodes * per_node
    if config.colocate or _trains_alone(config):
        return config.actor_num_nodes, per_node + 1
    serve = config.rollout_num_gpus or 0
    if config.debug_rollout_only:
        nodes = -(-serve // 8)
        return max(nodes, 1), -(-serve // max(nodes, 1)) + 1
    if config.actor_num_nodes == 1 and per_node + serve <= 8:
        return 1, per_node + serve + 1
    return config.actor_num_nodes + -(-serve // per_node), -(-(train + serve) // (config.actor_num_nodes + -(-serve // per_node))) + 1


def _trains_alone(config: Config) -> bool:
    """Nothing serves: the samples are there already."""
    return config.loss_type == "sft" or config.debug_train_only


def _deal(config: Config, nodes: int, per_node: int, device_rank: list[int]) -> tuple[list[int], list[int]]:
    """(ranks that train, ranks that serve)."""
    world = f"This world has {nodes} node(s) with {per_node} device rank(s) and a host rank each"
    if config.colocate or _trains_alone(config):
        wanted = config.actor_num_gpus_per_node
        if wanted is not None and (wanted != per_node or config.actor_num_nodes != nodes):
            raise WorldError(f"{world}, but --actor-num-nodes {config.actor_num_nodes} --actor-num-gpus-per-node {wanted} asks for "
                             f"{config.actor_num_nodes} x {wanted}: start {config.actor_num_nodes} node(s) with `--nproc-per-node {wanted + 1}` "
                             f"(devices + 1 host rank).")
        return [] if config.debug_rollout_only else device_rank, [] if _trains_alone(config) else device_rank
    train_per_node, serve = config.actor_num_gpus_per_node, config.rollout_num_gpus
    if config.debug_rollout_only:
        if serve != len(device_rank):
            raise WorldError(f"{world}, but --debug-rollout-only starts the --rollout-num-gpus {serve} that serve, and no others: on one node start "
                             f"`--nproc-per-node {(serve or 1) + 1}` (devices + 1 host rank).")
        return [], device_rank
    if train_per_node is None or serve is None:
        raise WorldError("Without --colocate, give --actor-num-gpus-per-node (devices that train) and --rollout-num-gpus (devices that serve).")
    train = config.actor_num_nodes * train_per_node
    if train + serve != nodes * per_node or train_per_node > per_node or config.actor_num_nodes > nodes:
        raise WorldError(f"{world}, {nodes * per_node} devices in all, but {config.actor_num_nodes} x {train_per_node} that train "
                         f"and {serve} that serve are {train + serve}: on one node start `--nproc-per-node {train + serve + 1}` "
                         "(devices + 1 host rank).")
    trainers = [r for i, r in enumerate(device_rank) if i // per_node < config.actor_num_nodes and i % per_node < train_per_node]
    return trainers, [r for r in device_rank if r not in set(trainers)]


def _engines(config: Config, servers: list[int], per_node: int) -> tuple[tuple[int, ...], ...]:
    size = config.rollout_num_gpus_per_engine
    if len(servers) % size:
        raise WorldError(f"{len(servers)} serving devices don't divide into engines of --rollout-num-gpus-per-engine {size}.")
    if servers and size < per_node and per_node % size and config.colocate:
        raise WorldError(f"An engine of {size} devices does not fit nodes of {per_node}: --rollout-num-gpus-per-engine must divide the node, "
                         "or be a multiple of it.")
    return tuple(tuple(servers[i:i + size]) for i in range(0, len(servers), size))
