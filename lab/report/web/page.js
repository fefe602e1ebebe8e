/* The page: sections, the header's buttons, theme and printing */

const SECTIONS = [  // id, title, short title in the navigation, function
  ["mine", data.title, data.title, mineSection],
  ["runs", "All runs", "All runs", runsSection],
  ["curves", "Learning curves", "Curves", curvesSection],
  ["cost", "Accuracy against cost", "Cost", costSection],
  ["finetuning", "Fine-tuning", "Fine-tuning", finetuningSection],
  ["efficiency", "Data efficiency", "Data efficiency", efficiencySection],
  ["confusion", "Confusion matrix", "Confusion", confusionSection],
  ["hardest", "The hardest test images", "Hardest images", hardestSection],
  ["pairs", "Paired comparisons", "Pairs", pairsSection],
  ["calibration", "Calibration", "Calibration", calibrationSection],
  ["sweeps", "Sweeps", "Sweeps", sweepsSection],
  ["attention", "Attention", "Attention", attentionSection],
  ["left-out", "Folders with problems", "Problems", leftOutSection],
  ["details", "Details of each run", "Details", detailsSection],
];

function build() {
  charts.length = 0;
  byId("content").replaceChildren();
  byId("sections").replaceChildren();
  for (const [id, title, short, make] of SECTIONS) {
    const nodes = make();
    if (nodes === null) continue;
    const heading = element("h2", { id: `${id}-title` }, title);
    const aria = { labelledby: heading.id };
    byId("content").append(element("section", { id, aria }, heading, ...nodes));
    byId("sections").append(element("a", { href: `#${id}` }, short));
  }
  byId("sections").hidden = false;
  charts.forEach((draw) => draw());
}

/* Buttons in the header */

function action(name, pressed) {
  const made = element("button", { type: "button", className: "plain" }, name);
  made.addEventListener("click", () => pressed(made));
  byId("actions").append(made);
  return made;
}

function liveButton() {
  const main = mainPage();
  if (main) byId("actions").append(pageLink(main));
}

function referenceToggle() {
  if (!hasReferences || !hasOwn) return;
  const box = element("input", { type: "checkbox", checked: showing.references });
  box.addEventListener("change", () => {
    showing.references = box.checked;
    build();
  });
  byId("actions").append(element("label", {}, box, "Show reference runs"));
}

function handIn() {
  const show = () => {
    const chosen = location.hash === "#hand-in";
    document.body.classList.toggle("hand-in", chosen);
    button.textContent = chosen ? "Whole report" : "Hand-in view";
    charts.forEach((draw) => draw());
  };
  const button = action("Hand-in view", () => {
    location.hash = document.body.classList.contains("hand-in") ? "mine" : "hand-in";
  });
  addEventListener("hashchange", show);
  show();
}

function lightOrDark() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const { style } = document.documentElement;
  const isDark = () => (style.colorScheme ? style.colorScheme === "dark" : system.matches);
  style.colorScheme = remembered("theme") ?? "";
  const button = action("", () => {
    style.colorScheme = isDark() ? "light" : "dark";
    remember("theme", style.colorScheme);
    show();
  });
  button.id = "scheme";
  const show = () => { button.textContent = isDark() ? "Light mode" : "Dark mode"; };
  system.addEventListener("change", show);
  show();
}

/* Opens the details of a run when a link points to them. */
function openTarget() {
  const target = byId(location.hash.slice(1));
  if (target?.localName === "details") target.open = true;
}

/* The printed page includes the details of the user's own runs. */
function printing() {
  let opened = [];
  addEventListener("beforeprint", () => {
    charts.forEach((draw) => draw(true));
    opened = [...document.querySelectorAll("details.own:not([open])")];
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => {
    charts.forEach((draw) => draw());
    opened.forEach((one) => { one.open = false; });
  });
}

build();
liveButton();
handIn();
referenceToggle();
lightOrDark();
printing();
openTarget();
byId("actions").hidden = false;
addEventListener("hashchange", openTarget);
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => charts.forEach((draw) => draw()));
});
