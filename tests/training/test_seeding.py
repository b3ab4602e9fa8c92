import torch

from sdtp.training.seeding import keyed_generator


def test_numbers_depend_on_every_part_of_the_key_and_on_nothing_else():
    def draw(*key):
        return torch.rand(4, generator=keyed_generator(*key))

    first = draw(1, 23, "a")
    torch.manual_seed(7)
    assert torch.equal(draw(1, 23, "a"), first)
    for key in ((2, 23, "a"), (1, 24, "a"), (1, 23, "b"), (12, 3, "a"), (1, 23)):
        assert not torch.equal(draw(*key), first)
