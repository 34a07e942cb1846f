// The list that the References node reads from its `strip` input, as plain data: no page, no node.
// An entry is {image, name, role, strength, on, size, vlm_size, mask}; `image` is a file of the
// input folder or an input ("image_2"); so is `mask`, which without a word is the input of the
// same number ("mask_2").
// Keys that this file does not know are kept.

const SOCKET = /^image_(\d+)$/;

/** Whether an entry stands for a picture that arrives through an input. */
export const isSocket = (source) => SOCKET.test(source);

const ordinal = (source) => Number(SOCKET.exec(source)[1]);

/** Entries of the list; null when the text is not such a list (the node says what is wrong). */
export function parse(text) {
  if (!text.trim()) return [];
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    return null;
  }
  if (!Array.isArray(values)) return null;
  const entries = values.map((value) => (typeof value === "string" ? { image: value } : value));
  return entries.every((entry) => typeof entry?.image === "string") ? entries : null;
}

/** The entries as the node puts them in order: those listed, then connected inputs not listed. */
export function complete(entries, connected) {
  const listed = new Set(entries.map((entry) => entry.image));
  const rest = [...connected].filter((source) => !listed.has(source));
  rest.sort((a, b) => ordinal(a) - ordinal(b));
  return [...entries, ...rest.map((image) => ({ image }))];
}

export const isOn = (entry) => entry.on !== false && entry.strength !== 0;

export const isMissing = (entry, connected) => isSocket(entry.image) && !connected.has(entry.image);

/** The N of "image N" in the instruction for each entry; null for those that are left out. */
export function numbers(entries, connected) {
  let count = 0;
  return entries.map((entry) => (isOn(entry) && !isMissing(entry, connected) ? ++count : null));
}

/** The text for the input; empty where it says nothing that the inputs do not say already. */
export function write(entries, connected) {
  const plain = (entry) => Object.keys(entry).length === 1;
  const unlisted = complete([], connected).map((entry) => entry.image);
  const told = entries.every((entry, i) => plain(entry) && entry.image === unlisted[i]);
  if (told && entries.length === unlisted.length) return "";
  return JSON.stringify(entries.map((entry) => (plain(entry) ? entry.image : entry)));
}

export function moved(entries, from, to) {
  const result = [...entries];
  result.splice(to, 0, ...result.splice(from, 1));
  return result;
}

export function toggled(entries, index) {
  const { on, ...entry } = entries[index];
  if (isOn(entries[index])) entry.on = false;
  else if (entry.strength === 0) delete entry.strength;
  return entries.with(index, entry);
}

const PLAIN = { name: "", role: "", strength: 1, size: "model", vlm_size: "model", mask: "" };

/** What an entry says, and what it means where it says nothing. */
export function settings(entry) {
  return Object.fromEntries(Object.keys(PLAIN).map((key) => [key, entry[key] ?? PLAIN[key]]));
}

/** The entries with one setting of one of them changed; what says nothing is not written. */
export function changed(entries, index, key, value) {
  const { [key]: _, ...entry } = entries[index];
  if (value !== PLAIN[key]) entry[key] = value;
  return entries.with(index, entry);
}

/**
 * The entries after the links changed. An input that lost its link closes the gap: the links behind
 * it move to the names before. So an entry stays with its link, or with its input when that was
 * given another link, and goes when both are gone. Its mask stays with it.
 * @param was, now  {images, masks}: Maps of input name to link id
 */
export function followed(entries, was, now) {
  const place = moves(was.images, now.images);
  return entries.flatMap((entry) => {
    const image = place(entry.image);
    return image === null ? [] : [masked({ ...entry, image }, entry, was.masks, now.masks)];
  });
}

/** Where is now what was wired to an input? Its name, null when it is gone; others stay. */
function moves(was, now) {
  const names = new Map([...now].map(([name, link]) => [link, name]));
  const old = new Set(was.values());
  return (name) => {
    const link = was.get(name);
    if (link === undefined) return name;
    const to = names.get(link) ?? name;
    const gone = !names.has(link) && (!now.has(to) || old.has(now.get(to)));
    return gone ? null : to;
  };
}

const NONE = "none"; // as a mask: not even the one that is wired to the input of that number

const maskInput = (source) => (isSocket(source) ? source.replace("image", "mask") : "");

/** The entry with the mask that it had as `old`; nothing is written that its number says already. */
function masked(entry, old, was, now) {
  const { mask: written, ...plain } = entry;
  const own = maskInput(entry.image);
  const from = written || maskInput(old.image);
  if (written && written !== NONE && !was.has(written)) return entry; // a file, or one still to come
  const known = [...was.values()].includes(now.get(own));
  if (now.has(own) && !known) return plain; // a mask that was just wired to its number
  const to = was.has(from) ? moves(was, now)(from) : null;
  if (to) return to === own ? plain : { ...plain, mask: to };
  return known ? { ...plain, mask: NONE } : plain; // another's mask that moved there is not its own
}
