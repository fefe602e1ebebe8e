/* What every page uses: its data, and functions that make elements. */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/* `aria` holds attributes whose names begin with "aria-". */
function element(name, { aria = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(aria)) made.setAttribute(`aria-${key}`, value);
  made.append(...children);
  return made;
}

function svg(name, { style = "", ...attributes }, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  made.style.cssText = style;  // the page's policy forbids the attribute
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
