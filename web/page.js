// What our scripts ask of the page and its graph, in one place.

import { app } from "../../scripts/app.js";

/**
 * The page's store of what nodes show: `nodeOutput` of its Pinia. It is not public: undefined where
 * a front end has none, and what is done with it is then left out.
 */
export function shownStore() {
  const page = document.getElementById("vue-app")?.__vue_app__;
  return page?.config.globalProperties.$pinia?._s?.get("nodeOutput");
}

/** The node that a job calls so: "5" of the graph, "5:3" in the subgraph of its node 5. */
export function nodeOf(id) {
  let graph = app.rootGraph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** The store's name of that node: "5" of the graph, "<id of the subgraph>:3" for "5:3". */
export function locatorOf(id) {
  const node = nodeOf(id);
  if (!node) return null;
  return node.graph === app.rootGraph ? String(node.id) : `${node.graph.id}:${node.id}`;
}
