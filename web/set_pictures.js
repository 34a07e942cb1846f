// An Image Set shows and saves each picture when it is done. The page shows what a node made last:
// one picture. Here all of them so far, in their order, whatever node of the set made them.

import { api } from "../../scripts/api.js";
import { locatorOf, shownStore } from "./page.js";

/** What each set made in the job that runs: "job node" -> pictures by the node that made them. */
let made = new Map();

/** The set that a node belongs to: "5" for "5.0.2.shown", which shows picture 2; else null. */
export const setOf = (node) => /^(.+?)\.\d+\.\w+\.shown$/.exec(node)?.[1] ?? null;

// Registered while the file loads, so before the page itself listens: it gets the longer list.
api.addEventListener("execution_start", () => (made = new Map()));
api.addEventListener("executed", ({ detail }) => {
  const { node, display_node: shown, prompt_id: job, output } = detail;
  if (!shown || !output?.images || setOf(node) !== shown) return;
  const key = `${job} ${shown}`;
  const parts = made.get(key) ?? new Map();
  made.set(key, parts.set(node, output.images));
  // As if the set had shown them: by that name the page finds them when its tab is opened again.
  Object.assign(detail, { node: shown, output: { ...output, images: [...parts.values()].flat() } });
  // A preview of a picture that is being painted hides finished ones, and stays when that is done,
  // for the page thinks that another node has ended.
  shownStore()?.revokePreviewsByLocatorId?.(locatorOf(shown));
});
