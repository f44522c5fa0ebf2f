/** The page on which images are generated. */

import { fetchJson } from "./api.js";
import { announce } from "./dom.js";

const { data } = await fetchJson("/v1/models");
announce(`serving ${data.map((/** @type {{id: string}} */ model) => model.id).join(", ")}`);
