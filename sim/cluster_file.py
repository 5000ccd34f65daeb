"""From a cluster file to a cluster that can be simulated."""

from sagellm.cluster.build import BuiltCluster, build_cluster
from sagellm.cluster.reading import read_cluster
from sim.cluster import SimCluster, SimInstance


def load_cluster(name_or_path: str, *, fast_forward: bool = True) -> SimCluster:
    """The named cluster, or that in a file, ready for `replay`. Raises ClusterFileError."""
    return sim_cluster(build_cluster(read_cluster(name_or_path), fast_forward=fast_forward))


def sim_cluster(built: BuiltCluster) -> SimCluster:
    return SimCluster(
        name=built.name,
        control_plane=built.control_plane,
        instances=tuple(SimInstance(instance.config, instance.cost_model) for instance in built.instances),
        link=built.link,
    )
