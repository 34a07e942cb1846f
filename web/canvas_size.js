// Canvas Size draws its canvas: the sheet in its shape, its pixels, what is painted beyond it. From
// the words that the node says: so no drawing is among the pictures of the history, and it is there
// again with the words, after a run that had the size already, in another tab, on another day.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { locatorOf, nodeOf, shownStore } from "./page.js";

const NODE = "SeedlingCanvasSize";
const [WIDTH, HEIGHT, MARGIN] = [448, 320, 16]; // of the drawing, in pixels
const [GROUND, SHEET, EDGE, MORE, INK] = ["#1d1f24", "#dfe3ea", "#8b94a5", "#343946", "#1d1f24"];
const SIDES = /^(\d+) x (\d+) pixels/;
const PADDED = /painted as (\d+) x (\d+)/;

/** Shows the canvas that a Canvas Size spoke of; other nodes and other words are left alone. */
export function drawCanvas(id, words) {
  const sides = SIDES.exec(words ?? "");
  if (!sides || nodeOf(id)?.comfyClass !== NODE) return;
  const [width, height] = sides.slice(1).map(Number);
  const [wide, high] = (PADDED.exec(words)?.slice(1) ?? [width, height]).map(Number);
  picture({ width, height, wide, high }, words.split(" · ")).toBlob((blob) => {
    const at = locatorOf(id);
    if (at) shownStore()?.setNodePreviewsByLocatorId?.(at, [URL.createObjectURL(blob)]);
  });
}

/** A drawing of a sheet of width x height pixels, painted as wide x high; `said` stands on it. */
function picture({ width, height, wide, high }, [title, ...more]) {
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
  const pen = canvas.getContext("2d");
  const room = [WIDTH - 2 * MARGIN, HEIGHT - 3 * MARGIN - 20];
  const scale = Math.min(room[0] / wide, room[1] / high);
  const [w, h, x, y] = [width, height, wide, high].map((side) => Math.max(2, side * scale));
  const left = MARGIN + (room[0] - x) / 2;
  const top = MARGIN + (room[1] - y) / 2;
  const box = (colour, ...place) => ((pen.fillStyle = colour), pen.fillRect(...place));
  box(GROUND, 0, 0, WIDTH, HEIGHT);
  if (wide !== width || high !== height) box(MORE, left, top, x, y);
  box(SHEET, left, top, w, h);
  pen.strokeStyle = EDGE;
  pen.strokeRect(left, top, w, h);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const write = (size, colour, text, ...place) => {
    Object.assign(pen, { font: `${size}px Inter, Arial, sans-serif`, fillStyle: colour });
    pen.fillText(text, ...place);
  };
  pen.font = "22px Inter, Arial, sans-serif";
  const fits = pen.measureText(title).width + 8 < w && h > 36;
  if (fits) write(22, INK, title, left + w / 2, top + h / 2);
  write(16, SHEET, (fits ? more : [title, ...more]).join(" · "), WIDTH / 2, HEIGHT - MARGIN - 6);
  return canvas;
}

/** Draws again what the page knows of the nodes in this graph and its subgraphs. */
export function drawKnown() {
  for (const [at, output] of Object.entries(app.nodeOutputs ?? {})) {
    if (!at.includes(":")) drawCanvas(at, output?.text?.[0]);
  }
}

api.addEventListener("executed", ({ detail }) => {
  drawCanvas(detail.display_node ?? detail.node, detail.output?.text?.[0]);
});
