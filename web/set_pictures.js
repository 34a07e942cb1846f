// An Image Set shows and saves each picture when it is done. The page shows what a node made last:
// one picture. Here all of them so far, in their order, whatever node of the set made them.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/** What each set has made in the job that runs: "job node" -> pictures by the node that made them. */
let made = new Map();

// Registered while the file loads, so before the page itself listens: it gets the longer list.
api.addEventListener("execution_start", () => (made = new Map()));
api.addEventListener("executed", ({ detail }) => {
  const { node, display_node: shown, prompt_id: job, output } = detail;
  // "5.0.2.shown" is of picture 2 of the set "5".
  if (!shown || !output?.images || !node.startsWith(`${shown}.`) || !node.endsWith(".shown")) return;
  const key = `${job} ${shown}`;
  const parts = made.get(key) ?? new Map();
  made.set(key, parts.set(node, output.images));
  detail.output = { ...output, images: [...parts.values()].flat() };
  previews()?.revokePreviewsByLocatorId?.(locator(shown));
});

/**
 * The page's store of what nodes show. A preview of a picture that is being painted hides finished
 * ones, and stays when that is done, for the page thinks that another node has ended.
 */
function previews() {
  const page = document.getElementById("vue-app")?.__vue_app__;
  return page?.config.globalProperties.$pinia?._s?.get("nodeOutput");
}

/** The store's name of a node: "5" of the graph, "<id of the subgraph>:3" for "5:3". */
function locator(id) {
  const path = id.split(":");
  const last = path.pop();
  const inner = path.reduce((graph, part) => graph?.getNodeById(Number(part))?.subgraph, app.rootGraph);
  return path.length ? `${inner?.id}:${last}` : last;
}
