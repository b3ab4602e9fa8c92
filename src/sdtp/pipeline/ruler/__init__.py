"""Synthetic long-context tasks after RULER (Hsieh et al. 2024, arXiv 2404.06654), at any prompt length over any text.

What follows RULER, section 3:

- *retrieval*: `single`, `multi_key` (one of several facts of the same form is asked for), `multi_value` (all values of
  one key), `multi_query` (the values of all keys); random seven-digit numbers, planted among unrelated text;
- *multi-hop tracing*: `variables`, chains of assignments in the order of the text, of which one is asked for;
- *aggregation*: `common_words` (a few words come up often, all others rarely, and there are more of those the longer
  the prompt is) and `frequent_words` (made-up words whose frequencies fall with the square of their rank);
- *question answering*: `qa`, one passage with the answer among others of its kind that lack it;
- scores: the share of references that stand in the prediction, for `qa` whether any does.

What differs:

- every wording, key and word list is this project's own; no fact, key or value is one that a scorer is trained on;
- a prompt has exactly the asked number of tokens, chat template and the beginning of the reply included. RULER stays
  below a length that the answer's tokens are part of;
- the text around facts is the caller's corpus for every task (RULER: essays, a repeated sentence, or more needles);
  where it happens to contain an answer, that sentence is left out;
- `single` plants its fact at a grid of depths, example by example; RULER draws them;
- facts have one form, names for keys and numbers for values (RULER has words and UUIDs too);
- no prompt has a worked example before its own, and lists of words are not numbered; common words are the corpus' own;
  frequencies of made-up words are exact, where RULER samples them and masks the most frequent one; the last few tokens
  of either list are filled by words that come up once;
- passages of `qa` are profiles of invented people, or the rows of the caller's file (SQuAD's fields); after
  `distractors` of them the corpus fills up. RULER takes all of them from SQuAD or HotpotQA;
- generation ends after twice the tokens of the references, or 32, since with containment longer replies score higher.
"""
