// What the reference strip says.

import { app } from "../../../scripts/app.js";

const EN = {
  strip: "References, in the order of the instruction",
  help:
    "Arrows: choose. Shift and an arrow: move. Space: on or off. F2: settings. Delete: take off " +
    "the list.",
  empty: "Connect pictures, or drop or paste files here.",
  add: "Add files",
  settings: {
    name: "name",
    role: "role",
    strength: "strength",
    size: "size",
    vlm_size: "encoder",
    mask: "mask",
  },
  settings_help: {
    name: "@name in the instruction means this picture",
    role: "What it is there for; it is added to the instruction",
    strength: "Lower fades it into transparency",
    size: "How large the model sees it; model: as the node says",
    vlm_size: "How large the text encoder sees it: smaller takes fewer tokens; model: as ever",
    mask: "What of it counts: the mask wired to its own number, another one, or none",
  },
  masks: { "": "its own", none: "none" },
  on: "On: click to leave it out",
  off: "Left out: click to use it",
  remove: "Take off the list",
  image: (number, label) => `image ${number}: ${label}`,
  left_out: (label) => `${label}, left out`,
  missing: (source) => `${source}: nothing is connected there`,
  broken: "The list below is not a JSON list of references; repair or empty it.",
  wired: "The list comes through its input; change it there.",
  full: (count) => `A References node takes ${count} pictures at most.`,
  no_picture: (name) => `${name} is not a picture.`,
  not_taken: (name, why) => `${name} was not taken: ${why}`,
};

const ZH = {
  strip: "参考图，按指令中的顺序",
  help: "方向键：选择。Shift 加方向键：移动。空格：启用或停用。F2：设置。Delete：从列表移除。",
  empty: "连接图片，或将文件拖放、粘贴到此处。",
  add: "添加文件",
  settings: {
    name: "名字",
    role: "用途",
    strength: "强度",
    size: "尺寸",
    vlm_size: "编码器",
    mask: "遮罩",
  },
  settings_help: {
    name: "指令里的 @名字 指这张图",
    role: "它的用途；会加到指令后面",
    strength: "越低越透明",
    size: "模型看到它的大小；model：按节点的设置",
    vlm_size: "文本编码器看到它的大小：越小 token 越少；model：照常",
    mask: "哪些部分算数：同号输入的遮罩、另一个遮罩，或不用",
  },
  masks: { "": "同号", none: "不用" },
  on: "已启用：点击停用",
  off: "已停用：点击启用",
  remove: "从列表移除",
  image: (number, label) => `image ${number}：${label}`,
  left_out: (label) => `${label}，已停用`,
  missing: (source) => `${source}：没有连接`,
  broken: "下面的列表不是参考图的 JSON 列表；请修正或清空。",
  wired: "列表来自其输入连接；请在那里修改。",
  full: (count) => `参考图节点最多 ${count} 张图片。`,
  no_picture: (name) => `${name} 不是图片。`,
  not_taken: (name, why) => `${name} 未被接收：${why}`,
};

/** The words in the page's language; English where there are none. */
export function words() {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  return String(locale).startsWith("zh") ? ZH : EN;
}
