// What one reference is: a form below the tiles, for the tile that was double-clicked (or F2).

const ROLES = ["the subject", "the style", "the layout", "the colours", "the background"];
const SIZES = ["model", "1K", "2K", "own"];
const VLM_SIZES = ["model", "256", "384", "512", "768", "1024"]; // any number of pixels is one too
let forms = 0; // for the ids that a list of suggestions needs

/**
 * @param words see words.js
 * @param act   {set(key, value), close()}
 * @returns {element, show(settings, title, masks), focus()}
 *   settings: {name, role, strength, size, vlm_size, mask}; masks: the inputs that have one
 */
export function makeSettings(words, act) {
  const element = document.createElement("form");
  element.className = "seedling-strip-settings";
  element.hidden = true;
  const title = document.createElement("div");
  const list = document.createElement("datalist");
  list.id = `seedling-strip-roles-${++forms}`;
  list.append(...ROLES.map((role) => new Option(role, role)));
  const fields = {
    name: input({ type: "text", placeholder: "anna" }),
    role: input({ type: "text", placeholder: ROLES[0] }),
    strength: input({ type: "range", min: 0.05, max: 1, step: 0.05 }),
    size: select(SIZES),
    vlm_size: select(VLM_SIZES),
    mask: select([]),
  };
  fields.role.setAttribute("list", list.id);
  element.append(title, list);
  for (const [key, field] of Object.entries(fields)) {
    const label = document.createElement("label");
    label.append(words.settings[key], field);
    label.title = words.settings_help[key];
    element.append(label);
    field.addEventListener("change", () => act.set(key, value(key, field)));
  }
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    act.close();
  });
  // The page has meanings of its own for keys: Delete removes the node.
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") act.close();
    event.stopPropagation();
  });
  element.addEventListener("pointerdown", (event) => event.stopPropagation());

  function show(settings, told, masks) {
    element.hidden = !settings;
    if (!settings) return;
    title.textContent = told;
    offer(fields.mask, ["", "none", ...masks], words.masks);
    for (const [key, field] of Object.entries(fields)) {
      const text = String(settings[key]);
      // What was written by hand, a size in pixels or a mask's file, is a choice too.
      if (field.options && ![...field.options].some((o) => o.value === text)) {
        field.append(new Option(text, text));
      }
      if (document.activeElement !== field || field.type !== "text") field.value = text;
    }
  }

  return { element, show, focus: () => fields.name.focus() };
}

function value(key, field) {
  if (key === "strength") return Number(field.value);
  if (field.options && /^\d+$/.test(field.value)) return Number(field.value);
  return field.value.trim();
}

function input(options) {
  return Object.assign(document.createElement("input"), { autocomplete: "off", ...options });
}

function select(values) {
  const made = document.createElement("select");
  offer(made, values);
  return made;
}

/** Gives a select these choices; `told` are words for some of them. */
function offer(field, values, told = {}) {
  const now = values.map((text) => new Option(told[text] ?? text, text));
  const same = (option, i) => option.value === field.options[i]?.value;
  if (now.length !== field.options.length || !now.every(same)) field.replaceChildren(...now);
}
