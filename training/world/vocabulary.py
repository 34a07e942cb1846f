"""The closed vocabulary of the Glyphfarm world: attributes, their colours in RGB, and their words
in two languages.

Every attribute is a plain string; its position in the tuple below is its class id. In each word
list the first entry is the usual word, the others are synonyms used now and then.
"""

from __future__ import annotations

# fmt: off
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = (
    "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black",
)
FILLS = ("plain", "striped", "dotted")
SIZES = ("small", "big")
GROUNDS = ("sand", "mint", "blue", "grey", "brown", "lilac")
TEXTURES = ("plain", "striped", "checked", "noisy", "gradient")
PHOTO, TRANSPARENT = "photo", "transparent"
PLACES = (
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)
RELATIONS = ("left", "right", "above", "below")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Main tone and second tone (stripes, dots): darker, so that it never looks like another colour; for
# white and black chosen so that the way to it stays clear of every background below.
OBJECT_RGB: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((222, 38, 40), (128, 14, 22)),
    "orange": ((250, 136, 14), (168, 78, 0)),
    "yellow": ((252, 226, 40), (176, 148, 0)),
    "green": ((34, 164, 58), (8, 88, 30)),
    "cyan": ((40, 214, 224), (0, 130, 146)),
    "blue": ((36, 78, 226), (12, 32, 128)),
    "purple": ((146, 44, 196), (82, 14, 118)),
    "pink": ((255, 122, 194), (184, 52, 124)),
    "white": ((250, 250, 250), (190, 196, 208)),
    "black": ((22, 22, 26), (84, 84, 128)),
}
GROUND_RGB: dict[str, tuple[int, int, int]] = {
    "sand": (204, 184, 146),
    "mint": (152, 194, 168),
    "blue": (104, 136, 178),
    "grey": (134, 136, 138),
    "brown": (122, 92, 70),
    "lilac": (168, 150, 194),
}

ENGLISH: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",),
    "star": ("star",), "heart": ("heart",), "cross": ("cross", "plus"),
    "ring": ("ring", "donut"), "moon": ("moon", "crescent"),
    "red": ("red",), "orange": ("orange",), "yellow": ("yellow",), "green": ("green",),
    "cyan": ("cyan", "turquoise"), "blue": ("blue",), "purple": ("purple", "violet"),
    "pink": ("pink",), "white": ("white",), "black": ("black",),
    "fill plain": ("plain", "solid"), "fill striped": ("striped",),
    "fill dotted": ("dotted", "spotted"),
    "small": ("small", "little", "tiny"), "big": ("big", "large"),
    "ground sand": ("sand", "beige"), "ground mint": ("mint",), "ground blue": ("blue",),
    "ground grey": ("grey", "gray"), "ground brown": ("brown",),
    "ground lilac": ("lilac", "lavender"),
    "texture plain": ("plain",), "texture striped": ("striped",),
    "texture checked": ("checked", "checkered"), "texture noisy": ("noisy", "grainy"),
    "texture gradient": ("gradient",),
}
CHINESE: dict[str, tuple[str, ...]] = {
    "circle": ("圆形", "圆"), "square": ("方形", "正方形"), "triangle": ("三角形",),
    "star": ("星形", "星星", "五角星"), "heart": ("心形", "爱心"), "cross": ("十字", "十字形"),
    "ring": ("圆环", "环形"), "moon": ("月亮", "月牙"),
    "red": ("红色",), "orange": ("橙色",), "yellow": ("黄色",), "green": ("绿色",),
    "cyan": ("青色",), "blue": ("蓝色",), "purple": ("紫色",), "pink": ("粉色", "粉红色"),
    "white": ("白色",), "black": ("黑色",),
    "fill plain": ("纯色", "实心"), "fill striped": ("条纹",), "fill dotted": ("圆点", "波点"),
    "small": ("小",), "big": ("大",),
    "ground sand": ("沙色", "米色"), "ground mint": ("薄荷色", "薄荷绿"),
    "ground blue": ("蓝色",), "ground grey": ("灰色",), "ground brown": ("棕色", "褐色"),
    "ground lilac": ("淡紫色", "丁香色"),
    "texture plain": ("纯色",), "texture striped": ("条纹",), "texture checked": ("方格", "格子"),
    "texture noisy": ("噪点", "颗粒"), "texture gradient": ("渐变",),
}
ENGLISH_PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "at the top center"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "at the left"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "at the bottom center"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
CHINESE_PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("左上角", "左上方"), "top": ("上方", "顶部"), "top right": ("右上角", "右上方"),
    "left": ("左侧",), "center": ("中间", "中央", "正中"), "right": ("右侧",),
    "bottom left": ("左下角", "左下方"), "bottom": ("下方", "底部"),
    "bottom right": ("右下角", "右下方"),
}
ENGLISH_RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}
CHINESE_RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("左边", "左面"), "right": ("右边", "右面"),
    "above": ("上边", "上面"), "below": ("下边", "下面"),
}
ENGLISH_NUMBERS = ("no", "a", "two", "three", "four")
CHINESE_NUMBERS = ("零", "一个", "两个", "三个", "四个")
# fmt: on
