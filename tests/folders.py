"""Made-up data folders in the layout of each benchmark's published files: a few drawn scenes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import world

N = 4  # pictures


def scene_picture(seed: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(world.draw(world.make_scene(seed, "test"), 60))).save(path)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make(name: str, folder: Path) -> None:
    """A folder for this benchmark, with the split that it asks for and the one with examples."""
    MAKERS[name](folder)


def mme(folder: Path) -> None:
    for subtask, place in (("count", ""), ("artwork", "images/")):
        for i in range(2):
            scene_picture(i, folder / subtask / f"{place}{i}.png")
            texts = folder / subtask / ("questions_answers_YN" if place else "")
            texts.mkdir(exist_ok=True)
            (texts / f"{i}.txt").write_text(
                "Is there a cat? Please answer yes or no.\tYes\n"
                "Is there a dog? Please answer yes or no.\tNo\n")


def mmmu(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    scene_picture(0, folder / "a.png")
    shown = {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    rows = [
        {"id": "validation_Art_1", "question": "Who painted <image 1>?", "answer": "B",
         "options": "['nobody', 'somebody', '<image 1>']", "question_type": "multiple-choice"},
        {"id": "validation_Math_1", "question": "How many are in <image 1> and <image 2>?",
         "answer": "['2', 'two']", "options": "[]", "question_type": "open"}]
    rows = [row | {f"image_{i}": shown if i < 3 else None for i in range(1, 8)} for row in rows]
    path = folder / "Art" / "validation-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def scienceqa(folder: Path) -> None:
    problems = {}
    for i in range(N):
        image = "image.png" if i % 2 else None
        if image:
            scene_picture(i, folder / "test" / str(i) / image)
        problems[str(i)] = {
            "question": "Which one?", "choices": ["a cat", "a dog", "a cup"], "answer": i % 3,
            "hint": "Look." * (i > 1), "image": image, "task": "", "grade": f"grade{3 * i + 1}",
            "subject": "natural science", "split": "test"}
    write(folder / "problems.json", problems)


def pope(folder: Path) -> None:
    for name in ("random", "popular", "adversarial"):
        rows = []
        for i in range(2 * N):
            shown = f"COCO_val2014_{i // 2:012d}.png"
            scene_picture(i // 2, folder / "val2014" / shown)
            rows.append({"question_id": i + 1, "image": shown, "text": "Is there a cat?",
                         "label": ("yes", "no")[i % 2]})
        (folder / f"coco_pope_{name}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


def chair(folder: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(N)]
    for i in range(N):
        scene_picture(i, folder / "val2014" / f"{i}.png")
    write(folder / "instances_val2014.json", {
        "images": images, "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 0, "category_id": 1}]})
    write(folder / "captions_val2014.json", {
        "annotations": [{"image_id": i, "caption": "A dog."} for i in range(N)]})
    (folder / "synonyms.txt").write_text("cat, kitten\ndog, puppy\n")


def vqa(folder: Path, prefix: str = "v2_") -> None:
    for split in ("val2014", "train2014"):
        questions, annotations = [], []
        for i in range(N):
            scene_picture(i, folder / split / f"COCO_{split}_{i:012d}.jpg")
            questions.append({"image_id": i, "question": "What is it?", "question_id": 10 + i})
            human = {"answer": "cats", "raw_answer": "cats", "answer_confidence": "yes"}
            annotations.append({
                "question_id": 10 + i, "image_id": i, "question_type": "what is",
                "answer_type": "other", "multiple_choice_answer": "cat",
                "answers": [human | {"answer_id": n} for n in range(1, 11)]})
        write(folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        write(folder / f"{prefix}mscoco_{split}_annotations.json", {"annotations": annotations})


def textvqa(folder: Path) -> None:
    for split in ("val", "train"):
        data = [{"question_id": i, "image_id": f"i{i}", "question": "What does it say?",
                 "answers": ["stop"] * 10} for i in range(N)]
        write(folder / f"TextVQA_0.5.1_{split}.json", {"data": data})
    for i in range(N):
        scene_picture(i, folder / "train_images" / f"i{i}.jpg")


def gqa(folder: Path) -> None:
    for split in ("testdev_balanced", "train_balanced"):
        write(folder / f"{split}_questions.json", {str(i): {
            "imageId": f"n{i}", "question": "Is it red?", "answer": "yes", "isBalanced": True,
            "types": {"structural": "verify"}} for i in range(N)})
    for i in range(N):
        scene_picture(i, folder / "images" / f"n{i}.jpg")


def aokvqa(folder: Path) -> None:
    for split in ("val", "train"):
        write(folder / f"aokvqa_v1p0_{split}.json", [{
            "question_id": f"q{i}", "image_id": i, "question": "What is it?",
            "choices": ["cat", "dog", "cup", "fish"], "correct_choice_idx": 0,
            "direct_answers": ["cat"] * 10, "difficult_direct_answer": False} for i in range(N)])
    for i in range(N):
        scene_picture(i, folder / "val2017" / f"{i:012d}.jpg")


def karpathy(folder: Path, name: str = "coco", place: str = "val2014") -> None:
    images = []
    for i in range(2 * N):
        scene_picture(i, folder / place / f"{i}.jpg")
        more = {"filepath": place, "cocoid": i} if name == "coco" else {}
        images.append({"filename": f"{i}.jpg", "split": ("test", "train")[i % 2], **more,
                       "sentences": [{"raw": f"A thing number {i}."}, {"raw": "Some things."}]})
    write(folder / f"dataset_{name}.json", {"images": images})


def nocaps(folder: Path) -> None:
    for i in range(N):
        scene_picture(i, folder / "images" / f"{i}.jpg")
    write(folder / "nocaps_val_4500_captions.json", {
        "images": [{"id": i, "file_name": f"{i}.jpg", "domain": ("in", "out")[i % 2]}
                   for i in range(N)],
        "annotations": [{"image_id": i, "caption": f"A thing number {i}."} for i in range(N)]})


def refcoco(folder: Path) -> None:
    for i in range(N):
        scene_picture(i, folder / "train2014" / f"{i}.jpg")
    write(folder / "instances.json", {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 60}
                   for i in range(N)],
        "annotations": [{"id": i, "bbox": [0, 0, 30, 30]} for i in range(N)]})
    write(folder / "refs.json", [{
        "ref_id": i, "ann_id": i, "image_id": i, "split": "val",
        "sentences": [{"sent_id": 2 * i + n, "sent": "the cat"} for n in range(2)]}
        for i in range(N)])


MAKERS = {
    "mme": mme, "mmmu": mmmu, "scienceqa": scienceqa, "pope": pope, "chair": chair, "vqav2": vqa,
    "okvqa": lambda folder: vqa(folder, ""), "textvqa": textvqa, "gqa": gqa, "aokvqa": aokvqa,
    "aokvqa-choices": aokvqa, "coco": karpathy,
    "flickr30k": lambda folder: karpathy(folder, "flickr30k", "flickr30k-images"),
    "nocaps": nocaps, "refcoco": refcoco,
}
