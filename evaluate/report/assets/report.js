// Says which checkpoint a point is, for fingers and keyboards too; the numbers are in the page without it.
for (const figure of document.querySelectorAll("figure")) {
  const said = figure.querySelector(".pointed");
  for (const tip of figure.querySelectorAll(".tip")) {
    const say = () => { said.textContent = tip.querySelector("title").textContent; };
    for (const kind of ["pointerenter", "focus", "click"]) tip.addEventListener(kind, say);
  }
}
