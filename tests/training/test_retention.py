from training.retention import kept


def test_newest_every_and_best_stay():
    held_out = {10: 1.0, 20: 0.2, 30: 0.5, 40: None, 50: 0.7, 60: 0.6}
    assert kept(held_out, 2, None) == {50, 60, 20}
    assert kept(held_out, 1, 30) == {60, 30, 20}
    assert kept({}, 2, None) == set()


def test_of_checkpoints_between_two_validations_the_first_is_the_best():
    assert kept({10: 0.9, 20: 0.2, 30: 0.2, 40: 0.5, 50: 0.5}, 1, None) == {20, 50}
