"""Grouping: nodes that can run together, because nothing that lies outside comes between them."""

from collections.abc import Collection

from torch import fx


def groups_of(graph: fx.Graph, known: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Return the known nodes of a graph in groups.

    A node joins the group of one of its inputs, or of another reader of an input, unless the group would then wait for a node
    that waits for the group.

    Args:
        graph: in a valid order.
        known: the nodes to group.

    Returns:
        The nodes of each group, in the order of the graph.

    Example:
        >>> def three(x):
        ...     a = x.relu()
        ...     return a.tanh() + a.relu().sin()
        >>> graph = fx.symbolic_trace(three).graph
        >>> groups_of(graph, [n for n in graph.nodes if n.name != "tanh" and n.op == "call_method"])
        [[relu, relu_1, sin]]
    """
    group: dict[fx.Node, int] = {}
    members: list[list[fx.Node]] = []
    waits_for: list[set[int]] = []  # the groups that each group reads
    for node in graph.nodes:
        reads = {group[n] for n in node.all_input_nodes}
        joined = next((g for g in _candidates(node, known, group) if not _reaches(reads - {g}, g, waits_for)), None)
        if joined is None or node not in known:
            joined = len(members)
            members.append([])
            waits_for.append(set())
        group[node] = joined
        members[joined].append(node)
        waits_for[joined] |= reads - {joined}
    return [nodes for nodes in members if nodes[0] in known]


def _candidates(node: fx.Node, known: Collection[fx.Node], group: dict[fx.Node, int]) -> list[int]:
    """Return the groups that a node may join: those of its inputs first."""
    inputs = [n for n in node.all_input_nodes if n in known]
    siblings = [user for n in node.all_input_nodes if n.op != "get_attr" for user in n.users if user in group and user in known]
    return list(dict.fromkeys(group[n] for n in (*inputs, *siblings)))


def _reaches(starts: set[int], goal: int, waits_for: list[set[int]]) -> bool:
    """Whether one of some groups waits for another group, directly or not."""
    seen, todo = set(starts), list(starts)
    while todo:
        for group in waits_for[todo.pop()]:
            if group == goal:
                return True
            if group not in seen:
                seen.add(group)
                todo.append(group)
    return goal in starts
