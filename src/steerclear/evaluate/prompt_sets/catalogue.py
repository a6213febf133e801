"""What is known of the public prompt sets: their columns, their sizes, who gives them out. Never their text."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

I2P_COLUMNS = ("prompt", "categories", "evaluation_seed", "evaluation_guidance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A public prompt set.

    Args:
        title: As its authors call it.
        columns: Columns that the file must have.
        counts: Numbers of rows that published versions have; empty if none is known.
        where: Where a user gets the file.
        licence: What its publisher says.
        kind: The kind that its prompts get in the table.
        categories: The column with the categories, split at ",".
        member: In JSON, the key of the list of rows, where the file is no plain list.
    """

    title: str
    columns: tuple[str, ...]
    counts: tuple[int, ...]
    where: str
    licence: str
    kind: str = "adversarial"
    categories: str | None = None
    member: str | None = None


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "i2p": Published(
            title="I2P",
            columns=I2P_COLUMNS,
            counts=(4703,),
            where="Hugging Face AIML-TUDA/i2p; copies in the repositories of SAFREE and Safe Denoiser",
            licence="MIT on the card (an older revision said GPL-3.0)",
            kind="implicit",
            categories="categories",
        ),
        "ring-a-bell-79": Published(
            title="Ring-A-Bell, the 79 rows of SAFREE and Safe Denoiser",
            columns=("sensitive prompt",),
            counts=(79,),
            where="the repositories of SAFREE and Safe Denoiser",
            licence="not found; the repositories carry no top-level licence",
        ),
        "ring-a-bell-95": Published(
            title="Ring-A-Bell, nudity (K = 16, 38, 77)",
            columns=("prompt", "evaluation_seed"),
            counts=(95, 285),
            where="Hugging Face Chia15/RingABell-Nudity, gated",
            licence="not found",
        ),
        "ring-a-bell-violence": Published(
            title="Ring-A-Bell, violence",
            columns=("prompt", "evaluation_seed"),
            counts=(250,),
            where="the Ring-A-Bell repository",
            licence="MIT",
        ),
        "unlearndiff": Published(
            title="UnlearnDiffAtk, nudity",
            columns=I2P_COLUMNS,
            counts=(142,),
            where="the repositories of UnlearnDiffAtk, SAFREE and Safe Denoiser",
            licence="MIT",
            categories="categories",
        ),
        "mma": Published(
            title="MMA-Diffusion",
            columns=("adv_prompt", "target_prompt"),
            counts=(1000,),
            where="Hugging Face YijunYang280; copies in the repositories of SAFREE and Safe Denoiser",
            licence="not found for the data; the code is CC BY-NC-ND 3.0",
        ),
        "p4d": Published(
            title="Prompting4Debugging",
            columns=("prompt",),
            counts=(),
            where="Hugging Face joycenerd/p4d",
            licence="MIT (repository)",
        ),
        "copro": Published(
            title="CoPro",
            columns=("unsafe_prompt", "concept", "category"),
            counts=(9996, 994),
            where="balanced selections in the Safe Denoiser repository; CoPro_v1.0.json in the LatentGuard repository",
            licence="BSD-3-Clause (LatentGuard repository)",
            kind="explicit",
            categories="category",
            member="ID_train_data",
        ),
        "coco-30k": Published(
            title="COCO captions, 30k",
            columns=("prompt", "evaluation_seed", "coco_id"),
            counts=(30000,),
            where="the repositories of SAFREE and Safe Denoiser",
            licence="that of the COCO captions; see cocodataset.org",
            kind="benign",
        ),
        "coco-10k": Published(
            title="COCO captions, the 9,966 of the published FID",
            columns=("prompt", "evaluation_seed", "coco_id"),
            counts=(9966,),
            where="the SAFREE repository",
            licence="that of the COCO captions; see cocodataset.org",
            kind="benign",
        ),
        "artists": Published(
            title="Artists",
            columns=("prompt", "evaluation_seed", "artist"),
            counts=(100,),
            where="the SAFREE repository, two files of 100",
            licence="none stated",
            kind="style",
        ),
        "memorised": Published(
            title="500 prompts that Stable Diffusion 1 memorised",
            columns=("caption",),
            counts=(500,),
            where="the repository diffusion_memorization (JSON Lines)",
            licence="not found",
            kind="memorised",
        ),
    }
)
