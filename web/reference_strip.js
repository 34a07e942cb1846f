// The reference strip: thumbnails on the References node, in the order of the instruction. Drag to
// reorder, click a number to leave a picture out, drop or paste files. All of it is written into
// the node's own `strip` input, so that a workflow made with it runs where this file is missing.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import {
  changed, complete, followed, isMissing, isOn, isSocket, moved, numbers, parse, settings, toggled,
  write,
} from "./reference_strip/list.js";
import { arriving, fileUrl, links } from "./reference_strip/pictures.js";
import { makeView } from "./reference_strip/view.js";
import { words } from "./reference_strip/words.js";

const NODE = "SeedlingReferences";
const MOST = 14; // MAX_REFERENCES of the node
const MARGIN = 10; // around a DOM widget, as the page has it
const LOOKS = 300; // milliseconds: the page tells nobody that a picture further up has changed

/** The strips of the nodes that are in a graph; the clock they share stops with the last. */
const strips = new Set();
let clock = null;

class Strip {
  constructor(node) {
    this.node = node;
    this.words = words();
    this.links = null;
    this.shown = "";
    this.view = makeView(this.words, {
      move: (from, to) => this.edit((entries) => moved(entries, from, to)),
      toggle: (index) => this.edit((entries) => toggled(entries, index)),
      remove: (index) => this.edit((entries) => entries.filter((_, i) => i !== index)),
      set: (index, key, value) => this.edit((entries) => changed(entries, index, key, value)),
      add: (files) => this.add(files),
    });
    const { element } = this.view;
    const widget = node.addDOMWidget("reference_strip", "SEEDLING_REFERENCE_STRIP", element, {
      serialize: false, // not in the prompt
      hideOnZoom: false,
      getMinHeight: () => Math.max(this.view.height(), 40) + 2 * MARGIN,
    });
    widget.serialize = false; // not in the workflow: the strip input holds everything
    // Its text is behind "advanced", for nodes drawn on the canvas too: those ask the widget.
    if (this.widget) this.widget.advanced = true;
    also(node, "onAdded", () => this.start());
    also(node, "onRemoved", () => this.stop());
    node.onDragOver = (event) => Boolean(event.dataTransfer?.types.includes("Files"));
    node.onDragDrop = (event) => this.dropped(event);
    if (node.graph) this.start();
  }

  start() {
    strips.add(this);
    clock ??= setInterval(() => strips.forEach((strip) => strip.look()), LOOKS);
  }

  stop() {
    strips.delete(this);
    if (strips.size) return;
    clearInterval(clock);
    clock = null;
  }

  get widget() {
    return this.node.widgets.find((widget) => widget.name === "strip");
  }

  /** The list is somebody else's when its input is wired (or a subgraph shows it outside). */
  get wired() {
    return this.node.inputs.some((input) => input.widget?.name === "strip" && input.link != null);
  }

  get text() {
    return String(this.widget?.value ?? "");
  }

  /** Change the list as a person does: one step for undo. */
  edit(change) {
    const connected = new Set(links(this.node).keys());
    const entries = parse(this.text);
    if (!entries || this.wired) return;
    app.canvas.emitBeforeChange();
    this.put(change(complete(entries, connected)), connected);
    this.look();
    app.canvas.emitAfterChange();
  }

  put(entries, connected) {
    const text = write(entries, connected);
    const { widget } = this;
    if (text === this.text) return;
    widget.value = text;
    widget.callback?.(text);
    this.node.graph.setDirtyCanvas(true, true);
  }

  /** The page drops a whole graph without a word to the nodes in its subgraphs. */
  get alive() {
    const { graph } = this.node;
    return graph === app.rootGraph || (graph && app.rootGraph.subgraphs.get(graph.id) === graph);
  }

  /** Show what is there now, when it is not what was there before. */
  look() {
    const { node } = this;
    if (app.configuringGraph || this.view.dragging()) return;
    if (!this.alive) {
      this.stop();
      return;
    }
    this.takePlace();
    const found = links(node);
    this.follow({ images: ids(found), masks: ids(links(node, "mask")) });
    const state = this.state(found);
    const told = JSON.stringify(state);
    if (told === this.shown) return;
    this.shown = told;
    this.view.render(state);
    if (!LiteGraph.vueNodesMode) this.makeRoom(); // there the page lays the node out itself
  }

  /**
   * Undo makes a new node with the old one's id, and Nodes 2.0 goes on showing the old one's
   * element: put ours there.
   */
  takePlace() {
    const { element } = this.view;
    const { node } = this;
    if (element.isConnected || !LiteGraph.vueNodesMode || app.canvas.graph !== node.graph) return;
    document.querySelector(`[data-node-id="${node.id}"] .seedling-strip`)?.replaceWith(element);
  }

  makeRoom() {
    const { node } = this;
    const height = node.computeSize([...node.size])[1];
    if (height > node.size[1]) node.setSize([node.size[0], height]);
    node.graph.setDirtyCanvas(true, true);
  }

  follow(now) {
    const was = this.links;
    this.links = now;
    const listed = parse(this.text);
    // Without a list and without masks pictures are in their order whatever happens.
    if (!was || !listed || this.wired || !(listed.length || was.masks.size)) return;
    const entries = complete(listed, was.images.keys());
    const after = followed(entries, was, now);
    if (JSON.stringify(after) === JSON.stringify(entries)) return;
    this.put(complete(after, now.images.keys()), new Set(now.images.keys()));
  }

  state(found) {
    const connected = new Set(found.keys());
    const listed = this.wired ? [] : parse(this.text);
    const entries = complete(listed ?? [], connected);
    const count = numbers(entries, connected);
    const seen = {};
    const items = entries.map((entry, index) => {
      const source = entry.image;
      seen[source] = (seen[source] ?? 0) + 1;
      const missing = isMissing(entry, connected);
      const picture = missing
        ? { label: source, url: null }
        : isSocket(source)
          ? arriving(this.node.graph, found.get(source))
          : { label: source, url: fileUrl(source) };
      return {
        key: `${source}#${seen[source]}`,
        label: picture.label || source,
        name: entry.name ? `@${entry.name}` : picture.label || source,
        url: picture.url,
        number: count[index],
        on: isOn(entry),
        missing,
        removable: missing || !isSocket(source),
        settings: settings(entry),
      };
    });
    const { words: say } = this;
    const note = this.wired ? say.wired : !listed ? say.broken : items.length ? null : say.empty;
    const masks = [...links(this.node, "mask").keys()];
    return { items, note, locked: this.wired || !listed, masks };
  }

  dropped(event) {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (files.length) this.add(files);
    return files.length > 0;
  }

  /** Upload files into the input folder and put them on the list. */
  async add(files) {
    const say = this.words;
    const entries = parse(this.text);
    if (this.wired || !entries) {
      tell(this.wired ? say.wired : say.broken);
      return;
    }
    for (const file of files) {
      if (!file.type.startsWith("image/")) tell(say.no_picture(file.name));
    }
    const pictures = files.filter((file) => file.type.startsWith("image/"));
    const room = MOST - complete(entries, links(this.node).keys()).filter(isOn).length;
    if (pictures.length > room) tell(say.full(MOST));
    for (const file of pictures.slice(0, Math.max(0, room))) {
      const source = await upload(file, say);
      if (source) this.edit((entries) => [...entries, { image: source }]);
    }
  }
}

const ids = (found) => new Map([...found].map(([source, link]) => [source, link.id]));

/** The name under which the server took the file; null, and a word about it, when it did not. */
async function upload(file, say) {
  const form = new FormData();
  form.append("image", file);
  form.append("type", "input");
  const answer = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (answer.status !== 200) {
    tell(say.not_taken(file.name, (await answer.text()) || answer.statusText));
    return null;
  }
  const { name, subfolder } = await answer.json();
  return subfolder ? `${subfolder}/${name}` : name;
}

function tell(detail) {
  app.extensionManager.toast.add({ severity: "warn", summary: "References", detail, life: 8000 });
}

/** Run `act` behind a method of this one node. */
function also(node, name, act) {
  const own = node[name];
  node[name] = function (...given) {
    const result = own?.apply(this, given);
    act();
    return result;
  };
}

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./reference_strip.css", import.meta.url).href;
  document.head.append(link);
}

app.registerExtension({
  name: "Seedling.ReferenceStrip",
  setup: addStyle,
  nodeCreated(node) {
    if (node.comfyClass === NODE) new Strip(node);
  },
});
