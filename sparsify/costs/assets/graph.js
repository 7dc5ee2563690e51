"use strict";
// The rewritten graph: blocks by module path, folded and unfolded, laid out by dagre and drawn by cytoscape.

const MOST = 120; // children of one block, above which they are put into blocks of their own

/** Colour of a density: few weights kept stand out. */
function colourOf(density) {
  const stops = [[0, [194, 65, 12]], [0.35, [240, 163, 94]], [0.7, [244, 227, 195]], [1, [159, 184, 214]]];
  const upper = Math.max(1, stops.findIndex(([at]) => density <= at));
  const [[a, from], [b, to]] = [stops[upper - 1], stops[upper]];
  const share = (density - a) / (b - a);
  return `rgb(${from.map((c, i) => Math.round(c + share * (to[i] - c))).join(",")})`;
}

/** The blocks that nodes lie in: {id: {id, label, parent, blocks, nodes}}, "" the whole; blocks of one node are left out. */
function blocksOf(nodes) {
  const blocks = { "": { id: "", label: "", parent: null, members: [] } };
  const counts = {};
  const prefixes = (path) => path.split(".").map((_, i, parts) => parts.slice(0, i + 1).join("."));
  for (const node of nodes) if (node.block) for (const prefix of prefixes(node.block)) counts[prefix] = (counts[prefix] || 0) + 1;
  for (const node of nodes) {
    let parent = "";
    for (const prefix of node.block ? prefixes(node.block) : []) {
      // a block that holds what its parent holds, or a single node, shows nothing
      if (counts[prefix] < 2 || (parent && counts[prefix] === counts[parent])) continue;
      if (!blocks[prefix]) {
        blocks[prefix] = { id: prefix, label: prefix.slice(parent ? parent.length + 1 : 0), parent, members: [] };
        blocks[parent].members.push({ block: prefix });
      }
      parent = prefix;
    }
    blocks[parent].members.push({ node: node.id });
    node.block = parent;
  }
  for (const block of Object.values({ ...blocks })) splitLarge(blocks, block, nodes);
  return blocks;
}

function splitLarge(blocks, block, nodes) {
  if (block.members.length <= MOST) return;
  const byId = Object.fromEntries(nodes.map((n) => [n.id, n]));
  const size = Math.ceil(block.members.length / Math.ceil(block.members.length / MOST));
  const members = [];
  for (let start = 0; start < block.members.length; start += size) {
    const own = block.members.slice(start, start + size);
    const id = `${block.id}#${start + 1}`;
    blocks[id] = { id, label: `${block.id} ${start + 1} to ${start + own.length}`.trim(), parent: block.id, members: own };
    for (const member of own) {
      if (member.block) blocks[member.block].parent = id;
      else byId[member.node].block = id;
    }
    members.push({ block: id });
  }
  block.members = members;
}

class GraphView {
  constructor(element, nodes, onChoose) {
    this.nodes = nodes;
    this.byId = Object.fromEntries(nodes.map((n) => [n.id, n]));
    this.blocks = blocksOf(nodes);
    this.open = new Set([""]);
    this.layers = {};
    this.chosen = new Set();
    this.cy = cytoscape({ container: element, minZoom: 0.02, maxZoom: 3, autoungrabify: true });
    this.cy.on("tap", "node", (event) => {
      const id = event.target.id();
      if (id.startsWith("b:")) this.toggle(id.slice(2));
      else onChoose(this.byId[id.slice(2)]);
    });
    this.openSmall();
  }

  /** Unfold what fits at a glance. */
  openSmall() {
    let shown = this.blocks[""].members.length;
    for (const { block } of this.blocks[""].members) {
      const more = block === undefined ? 0 : this.blocks[block].members.length - 1;
      if (block !== undefined && shown + more <= 32) {
        this.open.add(block);
        shown += more;
      }
    }
  }

  /** The id under which a node is shown: its own, or that of the outermost folded block around it. */
  shownAs(node) {
    let id = `n:${node.id}`;
    for (let block = node.block; block; block = this.blocks[block].parent) if (!this.open.has(block)) id = `b:${block}`;
    return id;
  }

  toggle(block) {
    if (this.open.has(block)) this.open.delete(block);
    else this.open.add(block);
    this.draw(block);
  }

  foldAll() {
    this.open = new Set([""]);
    this.draw();
  }

  /** Show nodes of some layers, unfolding the blocks around them, and mark them. */
  choose(names, move) {
    this.chosen = new Set(this.nodes.filter((n) => n.weights.some((w) => names.has(w))).map((n) => n.id));
    let changed = false;
    for (const id of move ? this.chosen : []) {
      for (let block = this.byId[id].block; block; block = this.blocks[block].parent) {
        changed = changed || !this.open.has(block);
        this.open.add(block);
      }
    }
    if (changed) this.draw();
    else this.mark();
    const found = this.cy.nodes(".chosen");
    if (move && found.length) this.cy.animate({ center: { eles: found }, zoom: Math.max(0.8, this.cy.zoom()) }, { duration: 250 });
  }

  mark() {
    this.cy.nodes().forEach((n) => n.toggleClass("chosen", n.id().startsWith("n:") && this.chosen.has(n.id().slice(2))));
  }

  summary(block) {
    let kept = 0, params = 0;
    const visit = (id) => this.blocks[id].members.forEach((m) => {
      if (m.block !== undefined) return visit(m.block);
      for (const w of this.byId[m.node].weights) {
        const layer = this.layers[w];
        if (layer) { kept += layer.kept; params += layer.params; }
      }
    });
    visit(block);
    return { kept, params };
  }

  elements() {
    const elements = [], edges = new Map();
    const show = (block, parent) => this.blocks[block].members.forEach((member) => {
      if (member.block === undefined) {
        const node = this.byId[member.node], layer = this.layers[node.weights[0]];
        const density = layer && layer.status === "masked" ? layer.density : null;
        const extra = density === null ? "" : `\n${(100 * density).toFixed(1)}% of ${layer.shape}`;
        elements.push({ data: { id: `n:${node.id}`, parent, label: node.label + extra, density }, classes: density === null ? "" : "masked" });
        return;
      }
      const own = this.blocks[member.block], id = `b:${own.id}`;
      if (this.open.has(own.id)) {
        elements.push({ data: { id, parent, label: `− ${own.label}` }, classes: "open" });
        show(own.id, id);
        return;
      }
      const { kept, params } = this.summary(own.id);
      const density = params ? kept / params : null;
      const extra = params ? `\n${(100 * density).toFixed(1)}% kept` : "";
      elements.push({ data: { id, parent, label: `+ ${own.label}${extra}`, density }, classes: params ? "block masked" : "block" });
    });
    show("", undefined);
    for (const node of this.nodes) {
      const target = this.shownAs(node);
      for (const source of node.inputs) {
        const from = this.byId[source] && this.shownAs(this.byId[source]);
        if (from && from !== target) edges.set(`${from}>${target}`, [from, target]);
      }
    }
    for (const [id, [source, target]] of edges) elements.push({ data: { id: `e:${id}`, source, target } });
    return elements;
  }

  draw(around) {
    const elements = this.elements(), layout = new dagre.graphlib.Graph({ compound: true });
    layout.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, marginx: 8, marginy: 8 });
    layout.setDefaultEdgeLabel(() => ({}));
    for (const { data, classes } of elements) {
      if (data.source) continue;
      const lines = data.label.split("\n");
      const width = Math.max(...lines.map((l) => l.length)) * 6.6 + 18, height = lines.length * 14 + 10;
      layout.setNode(data.id, classes === "open" ? {} : { width, height });
      Object.assign(data, { width, height });
    }
    for (const { data } of elements) {
      if (data.parent) layout.setParent(data.id, data.parent);
      if (data.source) layout.setEdge(data.source, data.target);
    }
    dagre.layout(layout);
    for (const element of elements) {
      const place = !element.data.source && layout.node(element.data.id);
      if (place) element.position = { x: place.x, y: place.y };
    }
    this.cy.batch(() => {
      this.cy.elements().remove();
      this.cy.add(elements);
    });
    this.paint();
    this.mark();
    const id = around && `b:${around}`;
    const focus = id && this.cy.getElementById(id);
    if (focus && focus.length) this.cy.fit(focus.closedNeighborhood(), 30);
    else this.fit();
    if (this.cy.zoom() > 1.2) this.cy.zoom(1.2), this.cy.center(focus && focus.length ? focus : undefined);
  }

  fit() {
    this.cy.resize();
    this.cy.fit(undefined, 12);
    const least = 0.45; // below, nothing can be read: show the beginning
    if (this.cy.zoom() < least && this.cy.nodes().length) {
      const box = this.cy.elements().boundingBox();
      this.cy.zoom(least);
      this.cy.pan({ x: this.cy.width() / 2 - least * (box.x1 + box.w / 2), y: 12 - least * box.y1 });
    }
  }

  zoom(factor) {
    const middle = { x: this.cy.width() / 2, y: this.cy.height() / 2 };
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: middle });
  }

  paint() {
    const css = getComputedStyle(document.documentElement), of = (name) => css.getPropertyValue(name).trim();
    this.cy.style([
      { selector: "node", style: {
        shape: "round-rectangle", label: "data(label)", "text-wrap": "wrap", "font-size": 11, "text-valign": "center", color: of("--text"),
        "background-color": of("--panel"), "border-color": of("--line"), "border-width": 1 } },
      { selector: "node[width]", style: { width: "data(width)", height: "data(height)" } },
      { selector: ".masked", style: { "background-color": (n) => colourOf(n.data("density")), color: "#1c1208" } },
      { selector: ".block", style: { "border-width": 2, "border-style": "double", "border-color": of("--soft") } },
      { selector: ".open", style: {
        "text-valign": "top", "background-opacity": 0.25, "border-style": "dashed", "text-margin-y": 14, padding: "16px", color: of("--soft") } },
      { selector: "edge", style: {
        width: 1.2, "line-color": of("--soft"), "target-arrow-color": of("--soft"), "target-arrow-shape": "triangle", "arrow-scale": 0.8,
        "curve-style": "bezier", opacity: 0.7 } },
      { selector: ".chosen", style: { "border-width": 4, "border-color": of("--accent"), "border-style": "solid" } },
    ]).update();
  }
}
