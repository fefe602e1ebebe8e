/* The hardest test images as a game: guess first, then see what the models answered */

const guesses = new Map();  // of each test set, by image; kept while the page is open
const MANY_CLASSES = 12;  // more classes: the reader chooses among the plausible ones

function hardestSection() {
  const sets = visible(data.comparisons).filter((set) => set.hardest.length > 0);
  if (sets.length === 0) return null;
  return [
    note("These are the test images that the largest number of models misclassify. Guess the ",
      "class of each image; ",
      "then you see the label and what every model answered. Some images are ambiguous, and some ",
      "labels may be wrong. ", SELECTION),
    ...sets.flatMap((set) => [setHead(set), gameOf(set)]),
  ];
}

function gameOf(set) {
  const key = `${set.reference}-${set.test_set}`;
  if (!guesses.has(key)) guesses.set(key, new Map());
  const mine = guesses.get(key);
  if (set.hardest.every((one) => one.thumbnail === null)) return unseen(set);
  const score = element("p", { className: "score", role: "status" });
  const board = box("game");
  const show = () => {
    score.textContent = scoreOf(set, mine);
    reveal.hidden = mine.size === set.hardest.length;
  };
  const tiles = set.hardest.map((one) => tileOf(set, one, mine, show));
  const reveal = element("button", { type: "button", className: "plain screen" },
    "Show all answers");
  reveal.addEventListener("click", () => tiles.forEach((tile) => tile.answer(null)));
  board.append(...tiles.map((tile) => tile.node));
  show();
  return box("", score, board, reveal, note(set.attribution));
}

/* Images that are not on this machine: there is nothing to guess, so the answers are shown. */
function unseen(set) {
  const tiles = set.hardest.map((one) =>
    element("article", { className: "tile" }, thumbnailOf(one, false), answersOf(one, null)));
  return box("", note("These images are not on this machine, so only the answers are shown."),
    box("game", ...tiles));
}

function scoreOf(set, mine) {
  const given = set.hardest.filter((one) => mine.get(one.image) != null);
  if (given.length === 0) return `${set.hardest.length} images to guess.`;
  const right = given.filter((one) => mine.get(one.image) === one.label).length;
  const range = wilson(right / given.length, given.length);
  const best = Math.max(...set.hardest[0].answers.map(({ run }) =>
    given.filter((one) => one.answers.some((a) => a.run === run && a.correct)).length));
  return `Your score: ${right} of ${given.length}, ${percent(right / given.length, 0)}\u00a0%` +
    ` (95 % interval ${percent(range.low, 0)} to ${percent(range.high, 0)}\u00a0%). ` +
    `The best model has ${best} of these ${given.length}.`;
}

/* One image: buttons for the classes, then the answers. */
function tileOf(set, one, mine, changed) {
  const node = element("article", { className: "tile" });
  const answer = (guess) => {
    if (mine.has(one.image)) return;
    mine.set(one.image, guess);
    draw();
    changed();
  };
  const draw = () => {
    const open = !mine.has(one.image);
    node.replaceChildren(thumbnailOf(one, open), open ? choicesOf(set, one, answer)
      : answersOf(one, mine.get(one.image)));
  };
  draw();
  return { node, answer };
}

function choicesOf(set, one, answer) {
  const { classes } = data.test_sets[set.test_set];
  const plausible = [...new Set([one.label, ...one.answers.map((a) => a.prediction)])];
  // more wrong ones, the same at each visit
  const start = [...one.image].reduce((sum, char) => sum + char.charCodeAt(0), 0);
  for (let i = 0; plausible.length < 4 && i < classes.length; i += 1) {
    const name = classes[(start + 7 * i) % classes.length];
    if (!plausible.includes(name)) plausible.push(name);
  }
  const shown = classes.length > MANY_CLASSES ? plausible.sort(collator.compare) : classes;
  const buttons = shown.map((name) => {
    const button = element("button", { type: "button", className: "choice" }, words(name));
    button.addEventListener("click", () => answer(name));
    return button;
  });
  const group = box(shown.every((name) => name.length < 3) ? "guess short" : "guess", ...buttons);
  Object.assign(group, { role: "group", ariaLabel: "Your guess" });
  return group;
}

function answersOf(one, guess) {
  const line = (who, prediction, correct, more = "") => element("li",
    { className: correct ? "right" : "wrong" }, correct ? "✓\u00a0" : "✗\u00a0", words(prediction),
    element("span", { className: "quiet" }, " ", who, more));
  return box("", element("strong", {}, words(one.label)),
    element("ul", { className: "answers" },
      ...(guess === null ? [] : [line("you", guess, guess === one.label)]),
      ...one.answers.map((a) => line(runLink(a.run, data.runs[a.run].model), a.prediction,
        a.correct, ` ${percent(a.confidence, 0)}\u00a0%`))));
}

function thumbnailOf({ image, label, thumbnail }, secret) {
  if (thumbnail === null) return box("quiet", words(image));
  const alt = `test image ${image}` + (secret ? "" : `, true class ${label}`);
  const made = element("img", { alt, title: image, src: thumbnail });
  made.addEventListener("load", () => {
    made.classList.toggle("pixels", made.naturalWidth < SMALL_IMAGE);
  });
  return made;
}
