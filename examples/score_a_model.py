"""How robust is a classifier? A plain torch model, images in, accuracy under attack out.

    python examples/score_a_model.py

The classifier here is a small linear one, trained in a second on scikit-learn's handwritten digits.
Put your own model in its place: any function of images (N, 3, H, W) in [0, 1] that returns logits
(N, C).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import mmtard_bench as mb

torch.manual_seed(0)

# 1. Data: images (N, 3, H, W) in [0, 1] and labels (N,).
data = load_digits()
pixels = torch.tensor(data.images, dtype=torch.float32) / 16
images = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
labels = torch.tensor(data.target)
train, test = slice(0, 1500), slice(1500, 1628)

# 2. A model: ten logits from the pixels.
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-4)
for _ in range(200):
    loss = nn.functional.cross_entropy(model(images[train]), labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# 3. Attack it. Each attack searches the ball around each image for one that the model gets wrong.
print("attack               eps     clean   robust")
for threat in ("pgd-20", "autoattack-standard"):
    for eps in ("4/255", "16/255"):
        found = mb.attack(
            model,
            images[test],
            labels[test],
            classes=10,
            threat=threat,
            eps=eps,
        )
        clean = found.clean_correct.float().mean()
        robust = found.robust.float().mean()
        print(f"{threat:20} {eps:7} {clean:6.1%}  {robust:6.1%}")

# 4. Look at one image that was broken: how far is it from the clean one, and what is the answer?
first = int(found.broken.nonzero()[0])
distance = (found.adversarial[first] - images[test][first]).abs().max()
answer = int(model(found.adversarial[first : first + 1]).argmax())
label, attack = int(labels[test][first]), found.broken_by[first]
print(f"\nimage {first}: a {label}, taken for a {answer} after {attack}")
print(f"largest change of a pixel: {float(distance) * 255:.1f} of 255")
