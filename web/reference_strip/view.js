// The strip on the page: a list box of thumbnails. It shows what it is told and says what was done;
// it knows nothing of nodes.

import { makeSettings } from "./settings.js";

const STARTS = 4; // pixels that the pointer moves before a press becomes a drag

/**
 * @param words see words.js
 * @param act   {move(from, to), toggle(index), remove(index), set(index, key, value), add(files)}
 * @returns {element, height(), dragging(), render({items, note, locked, masks})}
 *   items: [{key, label, name, url, number, on, missing, removable, settings}]
 */
export function makeView(words, act) {
  const element = make("div", "seedling-strip");
  const body = make("div", "seedling-strip-body");
  const list = make("div", "seedling-strip-list");
  const note = make("div", "seedling-strip-note");
  const live = make("div", "seedling-strip-live");
  const adder = addButton(words, act);
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-multiselectable", "true");
  list.setAttribute("aria-orientation", "horizontal");
  list.setAttribute("aria-label", words.strip);
  list.setAttribute("aria-description", words.help);
  live.setAttribute("aria-live", "polite");
  element.tabIndex = -1; // so that a click on it brings pasted files here
  const view = { items: [], masks: [], locked: false, drag: null, list, live, act, words };
  view.tiles = new Map();
  view.opened = null; // key of the item whose settings are shown
  view.form = makeSettings(words, {
    set: (key, value) => act.set(openedIndex(view), key, value),
    close: () => closeSettings(view),
  });
  body.append(list, adder, note, view.form.element, live);
  element.append(body);

  list.addEventListener("keydown", (event) => onKey(view, event));
  list.addEventListener("pointerdown", (event) => onPress(view, event));
  takeFiles(element, view);

  function render({ items, note: said, locked, masks }) {
    const focused = view.items[indexOf(view, document.activeElement)]?.key;
    Object.assign(view, { items, locked, masks });
    for (const key of view.tiles.keys()) {
      if (!items.some((item) => item.key === key)) view.tiles.delete(key);
    }
    const tiles = items.map((item) => tileFor(view, item));
    list.replaceChildren(...tiles);
    adder.hidden = locked;
    showSettings(view);
    rove(view, Math.max(0, items.findIndex((item) => item.key === focused)));
    if (focused !== undefined) view.tiles.get(focused)?.focus({ preventScroll: true });
    note.textContent = said ?? "";
    note.hidden = !said;
    element.classList.toggle("locked", locked);
  }

  return { element, render, height: () => body.offsetHeight, dragging: () => view.drag !== null };
}

function make(tag, name) {
  const made = document.createElement(tag);
  made.className = name;
  return made;
}

function addButton(words, act) {
  const button = make("button", "seedling-strip-add");
  button.type = "button";
  button.textContent = "+";
  button.title = words.add;
  button.setAttribute("aria-label", words.add);
  button.addEventListener("click", () => {
    const chooser = make("input", "");
    Object.assign(chooser, { type: "file", accept: "image/*", multiple: true });
    chooser.addEventListener("change", () => act.add([...chooser.files]));
    chooser.click();
  });
  return button;
}

// ---- tiles -------------------------------------------------------------------------------------

function tileFor(view, item) {
  const tile = view.tiles.get(item.key) ?? newTile(view, item.key);
  const { words } = view;
  const [picture, badge, remove, name] = tile.children;
  const told = item.missing
    ? words.missing(item.label)
    : item.on
      ? words.image(item.number, item.label)
      : words.left_out(item.label);
  tile.setAttribute("aria-label", told);
  tile.setAttribute("aria-selected", String(item.on));
  tile.title = told;
  tile.classList.toggle("off", !item.on);
  tile.classList.toggle("missing", item.missing);
  badge.textContent = item.number ?? "–";
  badge.title = item.on ? words.on : words.off;
  remove.hidden = !item.removable;
  name.textContent = item.name;
  const url = item.url ?? "";
  picture.hidden = !url;
  if (picture.getAttribute("src") !== url) {
    if (url) picture.src = url;
    else picture.removeAttribute("src");
  }
  return tile;
}

function newTile(view, key) {
  const tile = make("div", "seedling-strip-tile");
  const picture = make("img", "seedling-strip-picture");
  const badge = make("button", "seedling-strip-badge");
  const remove = make("button", "seedling-strip-remove");
  tile.setAttribute("role", "option");
  Object.assign(picture, { alt: "", draggable: false, decoding: "async" });
  picture.addEventListener("error", () => (picture.hidden = true));
  for (const button of [badge, remove]) Object.assign(button, { type: "button", tabIndex: -1 });
  remove.textContent = "×";
  remove.title = view.words.remove;
  remove.setAttribute("aria-label", view.words.remove);
  const index = () => view.items.findIndex((item) => item.key === key);
  badge.addEventListener("click", () => view.locked || view.act.toggle(index()));
  remove.addEventListener("click", () => view.locked || view.act.remove(index()));
  tile.addEventListener("focus", () => rove(view, index()));
  tile.addEventListener("dblclick", (event) => {
    if (!event.target.closest("button")) openSettings(view, key);
  });
  tile.append(picture, badge, remove, make("span", "seedling-strip-name"));
  view.tiles.set(key, tile);
  return tile;
}

const tilesOf = (view) => view.items.map((item) => view.tiles.get(item.key));

const indexOf = (view, node) => tilesOf(view).findIndex((tile) => tile.contains(node));

/** Tab reaches one tile, the arrow keys the others. */
function rove(view, index) {
  tilesOf(view).forEach((tile, i) => (tile.tabIndex = i === index ? 0 : -1));
}

// ---- settings ----------------------------------------------------------------------------------

const openedIndex = (view) => view.items.findIndex((item) => item.key === view.opened);

function openSettings(view, key) {
  view.opened = key;
  showSettings(view);
  if (openedIndex(view) >= 0 && !view.locked) view.form.focus();
}

function closeSettings(view) {
  const tile = view.tiles.get(view.opened);
  view.opened = null;
  showSettings(view);
  tile?.focus({ preventScroll: true });
}

function showSettings(view) {
  const item = view.locked ? undefined : view.items[openedIndex(view)];
  view.form.show(item?.settings, item?.label, view.masks);
  for (const [key, tile] of view.tiles) tile.classList.toggle("opened", key === view.opened);
}

// ---- keyboard ----------------------------------------------------------------------------------

const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -99, End: 99 };

function onKey(view, event) {
  const index = indexOf(view, event.target);
  if (index < 0 || !view.items.length || event.altKey || event.metaKey) return;
  const last = view.items.length - 1;
  if (event.key in STEPS) {
    const to = Math.min(last, Math.max(0, index + STEPS[event.key]));
    if (!(event.shiftKey || event.ctrlKey)) tilesOf(view)[to].focus();
    else if (!view.locked && to !== index) move(view, index, to);
  } else if (view.locked || event.ctrlKey) {
    return;
  } else if (event.key === "Enter" || event.key === " ") {
    view.act.toggle(index);
  } else if (event.key === "F2") {
    openSettings(view, view.items[index].key);
  } else if (event.key === "Delete" || event.key === "Backspace") {
    if (view.items[index].removable) view.act.remove(index);
  } else {
    return;
  }
  // The page has meanings of its own for these keys: Delete removes the node.
  event.preventDefault();
  event.stopPropagation();
}

function move(view, from, to) {
  view.act.move(from, to);
  const tile = tilesOf(view)[to]; // not by its key: the same file may be there twice
  tile?.focus({ preventScroll: true });
  view.live.textContent = tile?.getAttribute("aria-label") ?? "";
}

// ---- mouse, pen, finger ------------------------------------------------------------------------

function onPress(view, event) {
  const from = indexOf(view, event.target);
  if (event.button !== 0 || from < 0 || event.target.closest("button")) return;
  event.stopPropagation(); // or the page drags the node
  const { list } = view;
  const ends = new AbortController();
  const { signal } = ends;
  const finish = (keep) => {
    ends.abort();
    const tile = view.drag;
    view.drag = null;
    if (!tile) return;
    tile.classList.remove("dragged");
    const to = [...list.children].indexOf(tile);
    list.replaceChildren(...tilesOf(view)); // as it was: what is shown follows from the list
    if (keep && to !== from) move(view, from, to);
  };
  const on = (name, act) => addEventListener(name, act, { signal, capture: true });
  on("pointermove", (now) => {
    if (now.pointerId !== event.pointerId) return;
    if (!view.drag && !view.locked) {
      if (Math.hypot(now.clientX - event.clientX, now.clientY - event.clientY) < STARTS) return;
      view.drag = tilesOf(view)[from];
      view.drag.classList.add("dragged");
    }
    if (view.drag) place(view, now);
    now.stopPropagation();
  });
  on("pointerup", (now) => now.pointerId === event.pointerId && finish(true));
  on("pointercancel", () => finish(false));
  on("keydown", (now) => {
    if (now.key !== "Escape") return;
    now.stopPropagation();
    finish(false);
  });
}

/** Puts the dragged tile where the pointer is: before or behind the tile under it. */
function place(view, event) {
  const tiles = [...view.list.children];
  const under = tiles.find((tile) => {
    const box = tile.getBoundingClientRect();
    const inside = event.clientX >= box.left && event.clientX <= box.right;
    return inside && event.clientY >= box.top && event.clientY <= box.bottom;
  });
  if (!under || under === view.drag) return;
  const behind = tiles.indexOf(under) > tiles.indexOf(view.drag);
  under[behind ? "after" : "before"](view.drag);
}

// ---- files -------------------------------------------------------------------------------------

function takeFiles(element, view) {
  const carriesFiles = (event) => !view.locked && event.dataTransfer?.types.includes("Files");
  element.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    element.classList.remove("over");
    if (!carriesFiles(event)) return;
    event.preventDefault(); // the page opens dropped files that nobody took
    view.act.add([...event.dataTransfer.files]);
  });
  element.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (view.locked || !files.length) return;
    event.preventDefault();
    event.stopPropagation(); // the page would make a Load Image node of it
    view.act.add(files);
  });
}
