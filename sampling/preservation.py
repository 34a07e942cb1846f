"""How well an edit kept what it should not touch: PSNR, SSIM, colour difference and shift.

Pictures are (H, W, 3 or 4) in 0..1, sRGB; one with alpha is judged on white. A `keep` (H, W) is 1
where nothing should have changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import SamplingError

D65 = (0.95047, 1.0, 1.08883)  # the white of sRGB in XYZ, Y = 1
TO_XYZ = (  # linear sRGB -> XYZ, IEC 61966-2-1
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
FULL_RED = 10.0  # delta E that the map shows in full
LEAST = 256  # pixels that must be kept for a shift to be measured
ROUNDS = 8  # of measuring a shift and moving it back


@dataclass(frozen=True)
class Preservation:
    """What an edit did outside of its region. `psnr` in dB, infinite for the same bits."""

    psnr: float
    ssim: float  # mean structural similarity, 1 for the same
    delta_e: float  # mean CIEDE2000; differences below 1 are not seen
    delta_e_most: float  # its 99.9th percentile
    shift: tuple[float, float] | None  # pixels to the right and down; None where it cannot be told
    kept: float  # share of the picture that is outside
    map: Tensor  # (H, W, 3) grey, and red where colours differ

    def text(self) -> str:
        """The report in four lines."""
        decibel = "the same bits" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB"
        moved = "cannot be told"
        if self.shift is not None:
            moved = f"{self.shift[0]:+.3f}, {self.shift[1]:+.3f} pixels (right, down)"
        return (
            f"PSNR {decibel}, SSIM {self.ssim:.4f}\n"
            f"delta E 2000: mean {self.delta_e:.2f}, highest {self.delta_e_most:.2f}\n"
            f"shift: {moved}\n"
            f"judged: {self.kept:.1%} of the picture"
        )


def preservation(edited: Tensor, original: Tensor, region: Tensor | None = None) -> Preservation:
    """What lies outside of `region` (H, W; above 0 may change), compared with the original."""
    if edited.shape[:2] != original.shape[:2]:
        raise SamplingError(
            f"the edited picture is {edited.shape[1]} x {edited.shape[0]} pixels, the original "
            f"{original.shape[1]} x {original.shape[0]}; bring it back with Finish Edit first."
        )
    keep = torch.ones(original.shape[:2]) if region is None else (region <= 0).float()
    if not bool(keep.any()):
        raise SamplingError("the region covers the whole picture; nothing is left to compare.")
    new, old = on_white(edited), on_white(original)
    for what, image in (("edited", new), ("original", old)):
        if not bool(torch.isfinite(image).all()):
            raise SamplingError(
                f"the {what} picture has pixels that are no numbers (NaN), so nothing can be "
                "judged; paint it again, with other weights or in higher precision."
            )
    kept = keep.bool()
    error = (edited.float() - original.float()) if edited.shape == original.shape else new - old
    squared = float(error[kept].double().square().mean())
    rows = zip(new.split(256), old.split(256), strict=True)  # or a large one takes gigabytes
    difference = torch.cat([differences(a, b) for a, b in rows]) * keep
    values = difference[kept]
    # SSIM of a pixel looks 5 pixels far: those that see the region are left out where possible.
    clear = -F.max_pool2d(-keep[None, None], 11, 1, 5)[0, 0] > 0
    similar = ssim(new, old)[clear if bool(clear.any()) else kept]
    return Preservation(
        psnr=math.inf if squared == 0 else -10 * math.log10(squared),
        ssim=float(similar.mean()),
        delta_e=float(values.mean()),
        delta_e_most=float(values.kthvalue(max(1, math.ceil(0.999 * len(values)))).values),
        shift=shift(new, old, keep),
        kept=float(keep.mean()),
        map=heat(difference, old, keep),
    )


def on_white(image: Tensor) -> Tensor:
    """(H, W, 3) in fp32."""
    image = image.float().cpu()
    if image.shape[-1] == 3:
        return image
    return image[..., :3] * image[..., 3:] + (1 - image[..., 3:])


def grey(image: Tensor) -> Tensor:
    """Luma (H, W) of (H, W, 3), ITU-R BT.601."""
    return image @ image.new_tensor([0.299, 0.587, 0.114])


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (H, W) of the luma of two pictures (H, W, 3).

    Wang et al. 2004: Gaussian windows of 11 pixels and sigma 1.5, K1 0.01, K2 0.03.
    """
    at = torch.arange(11.0) - 5
    weights = torch.exp(-at.square() / (2 * 1.5**2))
    weights = weights / weights.sum()

    def blurred(x: Tensor) -> Tensor:
        padded = F.pad(x[None, None], (5, 5, 5, 5), mode="replicate")
        rows = F.conv2d(padded, weights.view(1, 1, 11, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, 11))[0, 0]

    x, y = grey(a), grey(b)
    mx, my = blurred(x), blurred(y)
    vx, vy = blurred(x * x) - mx * mx, blurred(y * y) - my * my
    both = blurred(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * both + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def lab(image: Tensor) -> Tensor:
    """CIE L*a*b* (H, W, 3), D65, of an sRGB picture."""
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    xyz = linear @ image.new_tensor(TO_XYZ).T / image.new_tensor(D65)
    low = (6 / 29) ** 3
    f = torch.where(xyz > low, xyz.clamp_min(low) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def differences(new: Tensor, old: Tensor) -> Tensor:
    """CIEDE2000 (H, W) of two sRGB pictures; 0 where they are the same, which costs nothing."""
    found, other = torch.zeros(new.shape[:2]), (new != old).any(dim=-1)
    found[other] = delta_e(lab(new[other]), lab(old[other]))
    return found


def delta_e(first: Tensor, second: Tensor) -> Tensor:
    """CIEDE2000 (...) of two L*a*b* colours (..., 3); Sharma, Wu and Dalal 2005."""
    l1, a1, b1 = first.double().unbind(-1)
    l2, a2, b2 = second.double().unbind(-1)
    chroma = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = 0.5 * (1 - torch.sqrt(chroma**7 / (chroma**7 + 25.0**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1) % math.tau, torch.atan2(b2, a2) % math.tau
    grey_one = c1 * c2 == 0
    turn = (h2 - h1 + math.pi) % math.tau - math.pi
    turn = torch.where((h2 - h1).abs() == math.pi, h2 - h1, turn).masked_fill(grey_one, 0.0)
    dl, dc, dh = l2 - l1, c2 - c1, 2 * torch.sqrt(c1 * c2) * torch.sin(turn / 2)
    lm, cm = (l1 + l2) / 2, (c1 + c2) / 2
    apart = (h1 - h2).abs() > math.pi
    around = torch.where(h1 + h2 < math.tau, (h1 + h2 + math.tau) / 2, (h1 + h2 - math.tau) / 2)
    hm = torch.where(apart, around, (h1 + h2) / 2)
    hm = torch.where(grey_one, h1 + h2, hm)
    t = (
        1
        - 0.17 * torch.cos(hm - math.radians(30))
        + 0.24 * torch.cos(2 * hm)
        + 0.32 * torch.cos(3 * hm + math.radians(6))
        - 0.20 * torch.cos(4 * hm - math.radians(63))
    )
    around_blue = torch.exp(-(((torch.rad2deg(hm) - 275) / 25) ** 2))
    rotation = -2 * torch.sqrt(cm**7 / (cm**7 + 25.0**7)) * torch.sin(math.pi / 3 * around_blue)
    sl = 1 + 0.015 * (lm - 50) ** 2 / torch.sqrt(20 + (lm - 50) ** 2)
    light, c, h = dl / sl, dc / (1 + 0.045 * cm), dh / (1 + 0.015 * cm * t)
    return torch.sqrt((light**2 + c**2 + h**2 + rotation * c * h).clamp_min(0)).float()


def shift(edited: Tensor, original: Tensor, keep: Tensor) -> tuple[float, float] | None:
    """How far (right, down) the kept part of `edited` lies from the original, in pixels.

    Phase correlation: the peak of the cross spectrum's phase, first to the pixel, then to 1/100 by
    a matrix Fourier transform around it (Guizar-Sicairos et al. 2008). The window stands still and
    pulls the peak towards 0, so the picture is moved back and measured again until nothing is left.
    None without anything to see there.
    """
    rows, columns = keep.shape
    window = torch.outer(
        torch.hann_window(rows, periodic=False), torch.hann_window(columns, periodic=False)
    )
    # Soft towards the region and nothing in it: its outline would be what stands still.
    soft = -F.max_pool2d(-keep[None, None], 17, 1, 8)
    window = window * F.avg_pool2d(soft, 17, 1, 8, count_include_pad=False)[0, 0]
    window = window.double()
    if float(keep.sum()) < LEAST or float(window.sum()) == 0:
        return None
    still, moving = windowed(grey(original).double(), window), grey(edited).double()
    found = [0.0, 0.0]
    for _ in range(ROUNDS):
        now = windowed(moved(moving, -found[0], -found[1]), window)
        if max(float(x.abs().max()) for x in (now, still)) < 1e-3:
            return None
        step = peak(torch.fft.fft2(now) * torch.fft.fft2(still).conj())
        found = [f + s for f, s in zip(found, step, strict=True)]
        if max(map(abs, step)) < 0.005:
            break
    return found[0], found[1]


def windowed(x: Tensor, window: Tensor) -> Tensor:
    return (x - (x * window).sum() / window.sum()) * window


def moved(x: Tensor, right: float, down: float) -> Tensor:
    """x (H, W) moved by parts of a pixel; what leaves on one side comes back on the other."""
    if right == down == 0:
        return x
    turns = [
        torch.fft.fftfreq(n, dtype=torch.float64) * by
        for n, by in zip(x.shape, (down, right), strict=True)
    ]
    turn = torch.exp(-2j * math.pi * (turns[0][:, None] + turns[1]))
    return torch.fft.ifft2(torch.fft.fft2(x) * turn).real


def peak(cross: Tensor) -> tuple[float, float]:
    """(right, down) of the highest point of a cross spectrum's phase correlation."""
    # Frequencies that hardly occur have a phase of rounding alone: they count less.
    cross = cross / (cross.abs() + 1e-4 * cross.abs().max())
    best = int(torch.fft.ifft2(cross).real.argmax())
    near = [
        v - n if v > n // 2 else v
        for v, n in zip(divmod(best, cross.shape[1]), cross.shape, strict=True)
    ]
    steps = torch.arange(-150, 151, dtype=torch.float64) / 100
    down, right = near[0] + steps, near[1] + steps
    turns = [
        torch.exp(2j * math.pi * torch.outer(where, torch.fft.fftfreq(n, dtype=torch.float64)))
        for where, n in zip((down, right), cross.shape, strict=True)
    ]
    fine = (turns[0] @ cross @ turns[1].T).real
    row, column = divmod(int(fine.argmax()), len(steps))
    return float(right[column]), float(down[row])


def heat(difference: Tensor, original: Tensor, keep: Tensor) -> Tensor:
    """The original in pale grey, redder where it differs, and darker where it was free to."""
    share = (difference / FULL_RED).clamp(0, 1)[..., None]
    pale = (0.5 + 0.5 * grey(original))[..., None] * (0.6 + 0.4 * keep[..., None])
    return torch.lerp(pale.expand(-1, -1, 3), pale.new_tensor([0.9, 0.0, 0.1]), share).clamp(0, 1)
