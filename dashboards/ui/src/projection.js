// Degrees in, map units out: the world is 1000 units wide. Used while building (coastlines) and while running (marks).
import { geoNaturalEarth1 } from 'd3-geo';

/** Natural Earth, turned by 11 degrees so that the edge of the map lies in the Bering Strait and cuts no land. */
export const projection = geoNaturalEarth1().rotate([-11, 0]).scale(183.8).translate([500, 270]);

/** What is shown when a fleet spans the world: from above Greenland to Cape Horn. */
export const WORLD = { x0: 0, y0: 18, x1: 1000, y1: 452 };
