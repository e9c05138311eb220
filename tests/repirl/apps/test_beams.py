"""Step-level search with scripted continuations and scores, against a search that was worked out by hand."""

import pytest

from repirl.apps.beams import SearchedPrompt, SearchShape, search_steps
from repirl.config import ConfigError
from repirl.rollout.steps import Continued

END = 9


class Script:
    """Continuations by (tree, round, place): tokens, of which END ends a response. Scores by the whole response, or the
    sum of its tokens. Keeps the prefixes that were continued in each round."""

    def __init__(self, lines, scores=None):
        self.lines, self.scores, self.prefixes = lines, scores or {}, []

    def continue_all(self, begun):
        self.prefixes.append([one.prefix for one in begun])
        self.whole = [one.whole for one in begun]
        answers = []
        for one in begun:
            _, _, tree, step, place = one.key
            tokens = self.lines[tree, step, place]
            answers.append(Continued(tokens, ended=tokens[-1] == END, cut=one.whole and tokens[-1] != END))
        return answers

    def score(self, beams):
        values = [self.scores.get(beam.token_ids, float(sum(beam.token_ids))) for _, beam in beams]
        return [((value,), value) for value in values]


def run(script, shape, prompts=1):
    rows = [SearchedPrompt(number, (number,)) for number in range(prompts)]
    return search_steps(rows, script.continue_all, script.score, shape)


# n = 4, m = 2: two of the four beams are kept in each round.
LINES = {
    # Scores 1, 4, 2, 3: 4 and 3 are kept, in this order.
    (0, 0, 0): (1,),
    (0, 0, 1): (4,),
    (0, 0, 2): (2,),
    (0, 0, 3): (3,),
    # 4,1 (5) · 4,END finished · 3,5 (8) · 3,2 (5): 3,5 is kept, and of the two with 5 the first.
    (0, 1, 0): (1,),
    (0, 1, 1): (END,),
    (0, 1, 2): (5,),
    (0, 1, 3): (2,),
    # 3,5,1 (9) · 3,5,END finished · 4,1,END finished · 4,1,0 (5): both that go on are kept.
    (0, 2, 0): (1,),
    (0, 2, 1): (END,),
    (0, 2, 2): (END,),
    (0, 2, 3): (0,),
    # The last round, to the end; two are cut off there.
    (0, 3, 0): (7, END),
    (0, 3, 1): (7, 7),
    (0, 3, 2): (8, 8),
    (0, 3, 3): (8, END),
}


def test_beam_search_is_the_one_worked_out_by_hand():
    script = Script(LINES)
    [result] = run(script, SearchShape("beam", beams=4, width=2, max_steps=4))
    assert script.prefixes == [
        [(), (), (), ()],
        [(4,), (4,), (3,), (3,)],
        [(3, 5), (3, 5), (4, 1), (4, 1)],
        [(3, 5, 1), (3, 5, 1), (4, 1, 0), (4, 1, 0)],
    ]
    assert all(script.whole)
    # Set aside in the order in which they finished. (4, END) never competed again, high as it scored.
    assert [beam.token_ids for beam in result.beams] == [
        (4, END),
        (3, 5, END),
        (4, 1, END),
        (3, 5, 1, 7, END),
        (3, 5, 1, 7, 7),
        (4, 1, 0, 8, 8),
        (4, 1, 0, 8, END),
    ]
    assert [beam.ended for beam in result.beams] == [True, True, True, True, False, False, True]
    assert [beam.score for beam in result.beams] == [13, 17, 14, 25, 23, 21, 22]
    # All sampled tokens count, of beams that were dropped, too: 4 + 4 + 4 + 8.
    assert (result.tokens, result.rounds) == (20, 4)


def test_fewer_beams_go_on_where_the_others_finished():
    lines = {(0, 0, place): (END,) for place in range(3)} | {(0, 0, 3): (1,)}
    lines |= {(0, 1, place): (END,) for place in range(2)}
    script = Script(lines)
    [result] = run(script, SearchShape("beam", beams=4, width=2, max_steps=4))
    assert script.prefixes == [[()] * 4, [(1,)] * 2]
    assert (len(result.beams), result.tokens, result.rounds) == (5, 6, 2)


def test_dvts_grows_independent_trees():
    # Tree 1 scores far above tree 0, which goes on nevertheless, each with its own best one.
    lines = {
        (0, 0, 0): (1,),
        (0, 0, 1): (2,),
        (1, 0, 0): (7,),
        (1, 0, 1): (6,),
        (0, 1, 0): (END,),
        (0, 1, 1): (3,),
        (1, 1, 0): (END,),
        (1, 1, 1): (END,),
        (0, 2, 0): (END,),
        (0, 2, 1): (END,),
    }
    script = Script(lines)
    [result] = run(script, SearchShape("dvts", beams=4, width=2))
    assert script.prefixes == [[(), (), (), ()], [(2,), (2,), (7,), (7,)], [(2, 3), (2, 3)]]
    assert [(beam.tree, beam.token_ids) for beam in result.beams] == [
        (0, (2, END)),
        (1, (7, END)),
        (1, (7, END)),
        (0, (2, 3, END)),
        (0, (2, 3, END)),
    ]
    # A tree is what it is without the other one.
    [alone] = run(Script(lines), SearchShape("dvts", beams=2, width=2))
    assert alone.beams == [beam for beam in result.beams if beam.tree == 0]
    # One tree of as many beams keeps the two best, both of them tree 1's.
    one_tree = {(0, step, place + 2 * tree): tokens for (tree, step, place), tokens in lines.items()}
    one_tree |= {(0, 1, place): (END,) for place in range(4)}
    script = Script(one_tree)
    run(script, SearchShape("beam", beams=4, width=2))
    assert script.prefixes[1] == [(7,), (7,), (6,), (6,)]


def test_prompts_do_not_meet():
    """What a prompt gets does not depend on those that are searched beside it."""
    shape = SearchShape("beam", beams=4, width=2, max_steps=4)
    [alone] = run(Script(LINES), shape)
    assert run(Script(LINES), shape, prompts=3) == [alone] * 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"beams": 6, "width": 4}, "--beams is 6, which --width 4 does not divide"),
        ({"method": "bfs"}, "--method is 'bfs', expected one of beam, dvts"),
        ({"width": 0}, "--width is 0, expected at least 1"),
        ({"max_steps": 0}, "--max-steps is 0"),
    ],
)
def test_what_is_no_search_is_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        SearchShape(**shape)
