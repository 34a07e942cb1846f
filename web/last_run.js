// When the page is loaded anew, nodes no longer show what they made, though the host still knows.
// Put back what the last job of an open workflow showed, where a node of ours was in it. Tabs that
// are opened from then on begin empty, as everywhere.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { drawCanvas, drawKnown } from "./canvas_size.js";
import { nodeOf, shownStore } from "./page.js";
import { setOf } from "./set_pictures.js";

const PREFIX = "Seedling"; // of all our node ids
const AFTER = 500; // milliseconds: the page puts back what it knows itself after the graph is there
const LOOKED = 50; // jobs, the newest first

let waiting = null; // paths of the tabs that were open when the page was loaded

async function putBack() {
  const { activeWorkflow, openWorkflows } = app.extensionManager.workflow ?? {};
  waiting ??= new Set((openWorkflows ?? []).map((workflow) => workflow.path));
  const first = waiting.delete(activeWorkflow?.path);
  if (!first || Object.keys(app.nodeOutputs ?? {}).length) {
    drawKnown();
    return;
  }
  const job = await lastJob(app.rootGraph.id);
  // Meanwhile another tab may have come to the front, or another job may have begun.
  if (!job || app.rootGraph.id !== job.workflow_id || Object.keys(app.nodeOutputs).length) return;
  const prompt = job.workflow?.prompt ?? {};
  const ours = Object.values(prompt).some((node) => node.class_type?.startsWith(PREFIX));
  if (!ours) return;
  for (const [id, output] of Object.entries(together(job.outputs))) show(id, output, prompt);
}

/** The newest finished job of a workflow, with its outputs; null when there is none. */
async function lastJob(workflow) {
  const asked = new URLSearchParams({ status: "completed,failed,cancelled", limit: LOOKED });
  const { jobs } = (await answer(`/jobs?${asked}`)) ?? {};
  const found = jobs?.find((job) => job.workflow_id === workflow);
  return found ? answer(`/jobs/${found.id}`) : null;
}

async function answer(path) {
  const response = await api.fetchApi(path).catch(() => null);
  return response?.ok ? response.json() : null;
}

/** Outputs by the nodes of the workflow: pictures of a set are the set's, in their order. */
function together(outputs) {
  const found = {};
  for (const [id, output] of Object.entries(outputs ?? {})) {
    const set = setOf(id);
    if (!set) found[id] = { ...found[id], ...output };
    else found[set] = { ...found[set], images: [...(found[set]?.images ?? []), ...output.images] };
  }
  return found;
}

/** Shows what a node made, if it is still the same kind of node. */
async function show(id, output, prompt) {
  const node = nodeOf(id);
  if (!node || node.comfyClass !== prompt[id]?.class_type) return;
  const there = await Promise.all((output.images ?? []).map(exists));
  const images = output.images?.filter((_, i) => there[i]);
  const kept = images?.length ? { ...output, images } : { ...output, images: undefined };
  shownStore()?.setNodeOutputsByExecutionId?.(id, kept);
  node.onExecuted?.(kept);
  const text = output.text?.[0];
  if (!text) return;
  if (node.comfyClass.startsWith(PREFIX)) {
    api.dispatchCustomEvent("progress_text", { nodeId: id, text }); // the words on the node
  }
  drawCanvas(id, text);
}

/** Whether a file is still there, and a picture: the host's temporary ones go. */
function exists(image) {
  const src = api.apiURL(`/view?${new URLSearchParams(image)}`);
  return Object.assign(new Image(), { src }).decode().then(() => true, () => false);
}

app.registerExtension({
  name: "Seedling.LastRun",
  afterConfigureGraph: () => void setTimeout(putBack, AFTER),
});
