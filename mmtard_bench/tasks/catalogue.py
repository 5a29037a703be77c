"""Tasks on public data sets: RobustVLM's 13 and ImageNet, with where each fact is from.

The repositories, and which data sets are attacked at native resolution: RobustVLM
(chs20/RobustVLM, CLIP_benchmark: datasets.txt, run_benchmark_adv.sh, cli.py). Class names and
templates are the files of the repositories. Numbers of classes and of test samples: DataComp
(mlfoundations/datacomp, tasklist.yml), whose data sets were converted by the same uploader with the
same program; the hub's listings agree as far as they go (pets, cars, caltech101, eurosat, pcam,
cifar100, fgvc_aircraft). Samples a shard follow from the listed sizes of shards, and are only a
guess at which one to look into first. A revision is the commit of the initial upload, where its
full name could be looked up; where it is "", the default branch is resolved at the first use. The
record holds the commit in any case. None of the repositories states a licence.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from mmtard_bench.data.digits import INK_CAPTION
from mmtard_bench.data.manifest import ROBUSTBENCH_LIST
from mmtard_bench.registry import register_task
from mmtard_bench.types import Surface, Task

IMAGENET_FOLDER = "IMAGENET_VAL"
"""The environment variable that names a folder of ImageNet's validation images."""

_UNSTATED = "none stated in the repository; see the citation"


@dataclass(frozen=True)
class HubDataset:
    """What is known of a data set in the hub's ``clip-benchmark/wds_*`` layout."""

    name: str
    repository: str
    title: str
    n_classes: int
    samples: int
    citation: str
    revision: str = ""
    shard_samples: int | None = None
    surface: Surface = "model"
    licence: str = _UNSTATED

    @property
    def task(self) -> Task:
        """Zero-shot classification of the test split with the prompts of the repository."""
        at = f"@{self.revision}" if self.revision else ""
        return Task(
            name=self.name,
            data=f"wds:{self.repository}{at}",
            templates=(),
            split="test",
            convert_rgb=True,
            description=(
                f"{self.title}: {self.n_classes:,} classes, {self.samples:,} test samples, "
                f"attacked at the {self.surface} resolution"
            ),
            n_classes=self.n_classes,
            samples=self.samples,
            shard_samples=self.shard_samples,
            surface=self.surface,
            licence=self.licence,
            citation=self.citation,
        )


ZERO_SHOT_13 = (
    HubDataset(
        "cifar10",
        "clip-benchmark/wds_vtab-cifar10",
        "CIFAR-10",
        10,
        10_000,
        "Krizhevsky, 2009, Learning multiple layers of features from tiny images",
        surface="native",
        licence="research use",
    ),
    HubDataset(
        "cifar100",
        "clip-benchmark/wds_vtab-cifar100",
        "CIFAR-100",
        100,
        10_000,
        "Krizhevsky, 2009, Learning multiple layers of features from tiny images",
        revision="c181ce0341d21e40ebe4f35a8fc56dd547e20418",
        surface="native",
        licence="research use",
    ),
    HubDataset(
        "stl10",
        "clip-benchmark/wds_stl10",
        "STL-10",
        10,
        8_000,
        "Coates, Ng and Lee, 2011, An analysis of single-layer networks",
        surface="native",
    ),
    HubDataset(
        "cars",
        "clip-benchmark/wds_cars",
        "Stanford Cars",
        196,
        8_041,
        "Krause et al., 2013, 3D object representations for fine-grained categorization",
        shard_samples=2_000,
    ),
    HubDataset(
        "caltech101",
        "clip-benchmark/wds_vtab-caltech101",
        "Caltech-101",
        102,
        6_085,
        "Fei-Fei, Fergus and Perona, 2004, Learning generative visual models",
        revision="96c3ed2decb80d5fe120fb8a0179f25c82cbee78",
        shard_samples=2_500,
        licence="CC BY 4.0 (CaltechDATA)",
    ),
    HubDataset(
        "pets",
        "clip-benchmark/wds_vtab-pets",
        "Oxford-IIIT Pet",
        37,
        3_669,
        "Parkhi et al., 2012, Cats and dogs",
        revision="3fbd1f21f076311402bb2bf2a9d1a04b72a4266d",
        shard_samples=2_500,
    ),
    HubDataset(
        "flowers",
        "clip-benchmark/wds_vtab-flowers",
        "Oxford Flowers-102",
        102,
        6_149,
        "Nilsback and Zisserman, 2008, Automated flower classification",
    ),
    HubDataset(
        "dtd",
        "clip-benchmark/wds_vtab-dtd",
        "Describable Textures",
        47,
        1_880,
        "Cimpoi et al., 2014, Describing textures in the wild",
    ),
    HubDataset(
        "eurosat",
        "clip-benchmark/wds_vtab-eurosat",
        "EuroSAT",
        10,
        5_400,
        "Helber et al., 2019, arXiv 1709.00029",
        shard_samples=2_500,
    ),
    HubDataset(
        "fgvc_aircraft",
        "clip-benchmark/wds_fgvc_aircraft",
        "FGVC-Aircraft",
        100,
        3_333,
        "Maji et al., 2013, arXiv 1306.5151",
    ),
    HubDataset(
        "pcam",
        "clip-benchmark/wds_vtab-pcam",
        "PatchCamelyon",
        2,
        32_768,
        "Veeling et al., 2018, arXiv 1806.03962",
        revision="502695fe1a141108650e3c5b91c8b5e0ff84ed49",
        shard_samples=5_000,
    ),
    HubDataset(
        "imagenet-r",
        "clip-benchmark/wds_imagenet-r",
        "ImageNet-R",
        200,
        30_000,
        "Hendrycks et al., 2021, arXiv 2006.16241",
    ),
    HubDataset(
        "imagenet_sketch",
        "clip-benchmark/wds_imagenet_sketch",
        "ImageNet-Sketch",
        1_000,
        50_889,
        "Wang et al., 2019, arXiv 1905.13549",
    ),
)

IMAGENET = HubDataset(
    "imagenet",
    "clip-benchmark/wds_imagenet1k",
    "ImageNet validation",
    1_000,
    50_000,
    "Russakovsky et al., 2015, arXiv 1409.0575",
    revision="b24c7a5a3ef12df09089055d1795e2ce7c7e7397",
)


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 names of OpenAI's notebook, in label order, as open_clip has them."""
    return _lines("imagenet_classes.txt")


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates for ImageNet, as open_clip has them."""
    return _lines("imagenet_templates.txt")


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple((files("mmtard_bench.tasks") / name).read_text("utf-8").splitlines())


def imagenet_folder(name: str, description: str, samples_file: str | None = None) -> Task:
    """ImageNet from the user's folder: one folder of JPEG files a class, named by its WordNet id.

    Sorted, the ids are in the order of the labels.
    """
    return Task(
        name=name,
        data=f"imagefolder:${IMAGENET_FOLDER}",
        templates=imagenet_templates(),
        classes=imagenet_classes(),
        convert_rgb=True,
        description=description,
        n_classes=IMAGENET.n_classes,
        samples_file=samples_file,
        surface="model",
        citation=IMAGENET.citation,
    )


TASKS = (
    *(dataset.task for dataset in ZERO_SHOT_13),
    IMAGENET.task,
    imagenet_folder(
        "imagenet-folder",
        f"ImageNet validation from the folder that ${IMAGENET_FOLDER} names, 80 templates",
    ),
    imagenet_folder(
        "imagenet-robustbench",
        f"the same, RobustBench's 5,000 images (its list in ${ROBUSTBENCH_LIST})",
        samples_file="robustbench",
    ),
)


DIGIT_TEMPLATE = "a photo of the digit {}"

register_task(
    Task(
        name="digits/digit",
        data="digits/test",
        templates=(DIGIT_TEMPLATE,),
        description="name the digit (10 classes), over all colour combinations",
    )
)
register_task(
    Task(
        name="digits/unseen",
        data="digits/unseen",
        templates=("{}",),
        description=f"choose among the 112 captions never trained on: '{INK_CAPTION}'",
    )
)
register_task(
    Task(
        name="digits/retrieval",
        data="digits/test",
        templates=("{}",),
        metric="retrieval",
        description="find each image's caption, and each caption's images, among the samples'",
    )
)
# Images KEY.jpg with KEY.txt, a caption a line; every line is a caption, as in CLIP_benchmark
# (clip_benchmark/datasets/builder.py, build_wds_dataset). Some of COCO's images are grey.
for _name, _title in (("flickr30k", "Flickr30k"), ("mscoco_captions", "MS-COCO captions")):
    register_task(
        Task(
            name=_name,
            data=f"wds:clip-benchmark/wds_{_name}",
            templates=("{}",),
            split="test",
            label_column="txt",
            convert_rgb=True,
            metric="retrieval",
            description=f"{_title}: retrieval in both directions; surface 'model'",
        )
    )
register_task(
    Task(
        name="digits/train",
        data="digits/train",
        templates=("{}",),
        description="for training: choose among the 448 captions of training",
    )
)
register_task(
    Task(
        name="digits/validation",
        data="digits/validation",
        templates=(DIGIT_TEMPLATE,),
        description="for training: name the digit, on images like those of training",
    )
)
for _task in TASKS:
    register_task(_task)
