// Where the pictures that are wired to a References node come from, and what the page can show of
// them. Links are followed through reroutes and through the walls of subgraphs.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const INPUT = /^(image|mask)s\.(\1_\d+)$/;
const KIND = / \[(input|output|temp)\]$/;
const BYPASSED = 4;
const MUTED = 2;

/** Map of input ("image_1") to its link, for the inputs of this kind that have one. */
export function links(node, kind = "image") {
  const found = new Map();
  (node.inputs ?? []).forEach((input, slot) => {
    const [, is, source] = INPUT.exec(input.name) ?? [];
    const link = is === kind && input.link != null ? node.getInputLink(slot) : null;
    if (link) found.set(source, link);
  });
  return found;
}

/** What to show of a picture that arrives over a link: {label, url}, url null if none is known. */
export function arriving(graph, link) {
  const node = originOf(graph, link, 0);
  if (!node) return { label: "", url: null };
  const file = uploaded(node);
  const named = node.title !== node.constructor.title;
  const beside = () => (node.graph === graph ? seenBeside(node, link) : null);
  const url = file?.url ?? produced(node) ?? beside();
  return { label: file && !named ? file.name : node.title, url };
}

/** What to show of a file of the input folder ("sub/cat.png", "cat.png [output]"). */
export function fileUrl(name, folder = "input") {
  const plain = name.replace(KIND, "");
  const cut = plain.lastIndexOf("/");
  const query = new URLSearchParams({
    filename: plain.slice(cut + 1),
    subfolder: cut < 0 ? "" : plain.slice(0, cut),
    type: KIND.exec(name)?.[1] ?? folder,
    preview: "webp;75",
  });
  return api.apiURL(`/view?${query}`);
}

/** The node whose output a link carries; null where it leads nowhere. */
function originOf(graph, link, depth) {
  if (!link || !graph || depth > 50) return null; // 50: a loop, which the page lets one draw
  if (link.originIsIoNode) {
    const host = hostOf(graph);
    const name = graph.inputs[link.origin_slot]?.name;
    const outer = host?.inputs.find((input) => input.name === name);
    return outer ? originOf(host.graph, host.graph.getLink(outer.link), depth + 1) : null;
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node || node.mode === MUTED || node.mode === BYPASSED) return null;
  if (node.subgraph) {
    const inner = node.subgraph.outputNode.slots[link.origin_slot]?.getLinks()[0];
    return originOf(node.subgraph, inner, depth + 1);
  }
  if (node.isVirtualNode && node.inputs?.length === 1) {
    return originOf(graph, node.getInputLink(0), depth + 1);
  }
  return node;
}

/** A node that stands for this subgraph. One with two shows the pictures of the first. */
function hostOf(subgraph) {
  const root = app.rootGraph;
  const graphs = [root, ...root.subgraphs.values()];
  return graphs.flatMap((graph) => graph.nodes).find((node) => node.subgraph === subgraph);
}

/** The file that a node such as Load Image reads: {name, url}; null for other nodes. */
function uploaded(node) {
  const specs = { ...node.constructor.nodeData?.input?.required };
  const widget = node.widgets?.find((each) => specs[each.name]?.[1]?.image_upload);
  const value = widget && valueOf(node, widget);
  if (!value) return null;
  const name = String(value);
  return { name, url: fileUrl(name, specs[widget.name][1].image_folder) };
}

/** A widget's value; that of the subgraph's own widget where it is shown outside. */
function valueOf(node, widget) {
  const slot = node.inputs.findIndex((input) => input.widget?.name === widget.name);
  const link = slot >= 0 && node.inputs[slot].link != null ? node.getInputLink(slot) : null;
  if (!link) return widget.value;
  if (!link.originIsIoNode) return null; // another node computes it
  const name = node.graph.inputs[link.origin_slot]?.name;
  return hostOf(node.graph)?.widgets.find((each) => each.name === name)?.value ?? null;
}

/** What a node shows that gets the same picture, such as Preview Image; null when none does. */
function seenBeside(node, link) {
  const slot = node.outputs[link.origin_id === node.id ? link.origin_slot : -1];
  const others = (slot?.links ?? []).map((id) => node.graph.getLink(id)?.target_id);
  for (const other of others.map((id) => node.graph.getNodeById(id))) {
    const url = other?.comfyClass?.match(/^(Preview|Save)Image/) ? produced(other) : null;
    if (url) return url;
  }
  return null;
}

/** The first picture that a node has shown; null when it has not run or shows none. */
function produced(node) {
  const inner = node.graph !== app.rootGraph;
  const output = app.nodeOutputs?.[inner ? `${node.graph.id}:${node.id}` : String(node.id)];
  const picture = output?.images?.[0];
  if (!picture) return node.imgs?.[0]?.src ?? null;
  return api.apiURL(`/view?${new URLSearchParams({ ...picture, preview: "webp;75" })}`);
}
