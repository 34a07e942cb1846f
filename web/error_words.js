// The page answers a failed node with one sentence for all errors ("This node threw an error during
// execution") and keeps the node's own words in a log. Ours say what to do: show them.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./page.js";

const PREFIX = "Seedling"; // of all our node ids
// The folder under which the pack was loaded: it is in the module names of our exceptions, which
// core's nodes raise too when they run our models.
const PACK = new URL(import.meta.url).pathname.split("/").at(-2);
const LIFE = 20_000; // milliseconds

let last = { text: "", time: -Infinity };

function tell({ detail }) {
  const { node_id: id, node_type: type, exception_message: text, exception_type: kind } = detail;
  if (!text || !(type?.startsWith(PREFIX) || kind?.split(/[./\\]/).includes(PACK))) return;
  // Five hundred queued jobs may fail for one reason.
  const now = performance.now();
  if (text === last.text && now - last.time < LIFE) return;
  last = { text, time: now };
  app.extensionManager.toast.add({
    severity: "error",
    summary: titleOf(id, type),
    detail: text.trim(),
    life: LIFE,
  });
}

function titleOf(id, type) {
  const node = nodeOf(id);
  // The job may be another workflow's than the one that is open.
  if (node?.comfyClass === type) return node.title;
  return LiteGraph.registered_node_types[type]?.title ?? type;
}

app.registerExtension({
  name: "Seedling.ErrorWords",
  setup() {
    api.addEventListener("execution_error", tell);
  },
});
